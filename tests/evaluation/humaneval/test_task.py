"""HumanEval as a task of a suite: items paired with the reference, gates on what was lost, answers side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qconv.evaluation.cache import Cache
from qconv.evaluation.engines.base import Engine
from qconv.evaluation.gates import load_gates
from qconv.evaluation.humaneval import run as run_module
from qconv.evaluation.humaneval import task as task_module
from qconv.evaluation.humaneval.dataset import Problem
from qconv.evaluation.humaneval.settings import HumanEvalSettings
from qconv.evaluation.humaneval.task import measure
from qconv.evaluation.judging import judge
from qconv.evaluation.kept_files import load_json
from qconv.evaluation.record import Artifact, Task
from qconv.evaluation.sandbox.bubblewrap import Bubblewrap
from qconv.evaluation.sandbox.proof import Proof
from qconv.evaluation.tasks import Bench, Subject
from tests.evaluation.humaneval.test_run import Scripted

COUNT = 12

Measure = Callable[..., Task]


@pytest.fixture
def measured(
    problems: Sequence[Problem], backend: Bubblewrap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Measure:
    """The task with a build that fails some problems beside a reference that fails others; proofs have own tests."""
    monkeypatch.setattr(run_module, "prove", lambda *_: Proof("bubblewrap", 0, 0, 0.0))
    monkeypatch.setattr(task_module, "find_backend", lambda: backend)

    def subject(name: str, failing: Sequence[int]) -> Subject:
        answers = {f"HumanEval/{number}": "    return None\n" for number in failing}
        engine: Engine = Scripted(problems, answers)
        artifact = Artifact(name=name, path=name, kind="build", sha256=("0" if name == "build" else "1") * 64)
        return Subject(tmp_path / name, artifact, lambda dtype, rows: engine)

    def go(build: Sequence[int], reference: Sequence[int] | None, **settings: Any) -> Task:
        bench = Bench(
            build=subject("build", build),
            reference=None if reference is None else subject("reference", reference),
            model_dir=tmp_path,
            cache=Cache(tmp_path / "cache"),
            folder=tmp_path / "run",
            work=tmp_path / "work",
            seed=0,
            noise=None,
            progress=lambda *_: None,
            log=lambda _: None,
        )
        return measure(HumanEvalSettings(problems=COUNT, **settings), bench)

    return go


def test_what_was_lost_and_gained_is_told_and_gated(measured: Measure, tmp_path: Path) -> None:
    task = measured(build=[*range(1, COUNT)], reference=[0])
    assert task.metrics["pass@1"].value == pytest.approx(1 / COUNT)
    assert task.metrics["reference.pass@1"].value == pytest.approx(11 / COUNT)
    assert task.details["gained"] == ["HumanEval/0"]
    assert task.details["lost"] == [f"HumanEval/{number}" for number in range(1, COUNT)]
    gates = load_gates("default")
    (gate,) = judge([task], gates.classes[0], gates)
    # 11 lost and 1 gained: p = 2 * 13 / 2**12, which is not below 0.001.
    assert (gate.metric, gate.status) == ("pass@1", "inconclusive")
    assert gate.p_value == pytest.approx(26 / 4096)
    answers: Any = load_json(tmp_path / "run", task.files["answers"])
    assert len(answers) == COUNT
    first = next(one for one in answers if one["problem"] == "HumanEval/0")
    assert (first["reference"]["status"], first["build"]["status"]) == ("fail", "pass")
    assert first["prompt"].startswith("from typing import List")


def test_a_clear_loss_fails(measured: Measure) -> None:
    gates = load_gates("default")
    task = measured(build=[*range(COUNT)], reference=[])
    (gate,) = judge([task], gates.classes[0], gates)
    assert gate.status == "fail"  # 12 of 12 lost: p = 2 / 2**12


def test_what_a_server_refuses_to_be_told_is_recorded(measured: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scripted, "refused", ("top_k", "min_p"), raising=False)
    task = measured(build=[3], reference=None)
    told: Any = task.details["generation"]
    assert told["refused"] == ["top_k", "min_p"]
    assert "greedy but for top_k, min_p" in task.source


def test_the_references_answers_are_known_the_second_time(measured: Measure, tmp_path: Path) -> None:
    first = measured(build=[0], reference=[])
    journals = [path.read_bytes() for path in (tmp_path / "cache").rglob("*.jsonl")]
    again = measured(build=[0], reference=[])
    assert [path.read_bytes() for path in (tmp_path / "cache").rglob("*.jsonl")] == journals
    assert len(journals) == 1
    assert again.reference_items == first.reference_items
    assert again.inputs_sha256 == first.inputs_sha256


def test_without_a_reference_only_the_build_is_measured(measured: Measure) -> None:
    task = measured(build=[3], reference=None)
    told: Any = task.details["generation"]
    assert (told["decoding"], told["repetition_penalty"], told["top_k"]) == ("greedy", 1.0, None)
    assert "refused" not in told
    assert task.source.endswith("1 answers each, greedy")
    assert task.reference_items == ()
    assert set(task.metrics) == {"pass@1"}
    low, high = task.metrics["pass@1"].low, task.metrics["pass@1"].high
    assert low is not None
    assert high is not None
    assert low < 11 / COUNT < high < 1.0
