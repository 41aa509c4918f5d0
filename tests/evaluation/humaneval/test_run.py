"""A run from prompts to pass@k with an engine that answers from a list: resuming, failures, proofs, interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pydantic import ValidationError

from qconv.errors import ArtifactError, SandboxError, StaleJournalError
from qconv.evaluation.engines.base import Completion, Logits, Prompt, Sampling, Step, silent
from qconv.evaluation.humaneval import run as run_module
from qconv.evaluation.humaneval.dataset import Problem
from qconv.evaluation.humaneval.run import Outcome, run
from qconv.evaluation.humaneval.samples import JOURNAL_NAME
from qconv.evaluation.humaneval.settings import HumanEvalSettings
from qconv.evaluation.sandbox import judge as judge_module
from qconv.evaluation.sandbox import proof as proof_module
from qconv.evaluation.sandbox.bubblewrap import Bubblewrap
from qconv.evaluation.sandbox.forgeries import FORGERIES, HONEST
from qconv.evaluation.sandbox.pool import JudgePool
from qconv.evaluation.sandbox.proof import Proof
from qconv.evaluation.sandbox.verdict import Status
from tests.evaluation.sandbox.test_survivors import descendants, survivors


@dataclass(slots=True)
class Scripted:
    """Answers of its own for some prompts, the reference solution for the others."""

    problems: Sequence[Problem]
    answers: Mapping[str, str] = field(default_factory=dict)
    rows: int = 4
    version: str = "1"
    asked: list[int] = field(default_factory=list)
    """Prompts of each call."""

    @property
    def identity(self) -> Mapping[str, str]:
        return {"engine": "scripted", "version": self.version}

    def logits(self, sequences: Sequence[Sequence[int]]) -> Iterator[Logits]:
        raise NotImplementedError

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling, step: Step = silent) -> Iterator[Completion]:
        self.asked.append(len(prompts))
        by_prompt = {problem.prompt: problem for problem in self.problems}
        for index, prompt in enumerate(prompts):
            problem = by_prompt[prompt.text]
            for sample in range(sampling.samples):
                text = self.answers.get(f"{problem.task_id}#{sample}") or self.answers.get(problem.task_id)
                yield Completion(index, sample, text or problem.canonical_solution, (1, 2, sample), "stop")

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few forgeries: each is tested by itself elsewhere."""
    monkeypatch.setattr(proof_module, "FORGERIES", FORGERIES[:3])
    monkeypatch.setattr(judge_module, "_PAUSE_SECONDS", 0.01)


@pytest.fixture
def ten(problems: tuple[Problem, ...]) -> tuple[Problem, ...]:
    """The first ten."""
    return problems[:10]


SETTINGS = HumanEvalSettings(cpu_seconds=1)
WRONG = "    return None\n"


def measure(engine: Scripted, folder: Path, backend: Bubblewrap, settings: HumanEvalSettings = SETTINGS) -> Outcome:
    return run(engine, engine.problems, settings, folder, backend=backend, seed=0)


def test_right_answers_pass_and_wrong_ones_do_not(
    backend: Bubblewrap, ten: tuple[Problem, ...], tmp_path: Path
) -> None:
    answers = {
        "HumanEval/0": WRONG,
        "HumanEval/3": "    while True: pass\n",
        "HumanEval/5": "    return [0] * (1 << 40)\n",
        "HumanEval/7": "    return strings\n\ndef check(candidate):\n    pass\n",
    }
    outcome = measure(Scripted(ten, answers), tmp_path, backend)
    statuses = {sample.task_id: sample.status for sample in outcome.samples}
    assert [name for name, status in statuses.items() if status is not Status.PASS] == list(answers)
    assert statuses["HumanEval/3"] is Status.TIMEOUT
    assert statuses["HumanEval/5"] is Status.MEMORY
    assert outcome.pass_at(1) == pytest.approx(0.6)
    assert outcome.statuses() == {Status.PASS: 6, Status.FAIL: 2, Status.TIMEOUT: 1, Status.MEMORY: 1}
    assert outcome.unjudged() == ()
    assert outcome.proof is not None
    assert outcome.proof.solutions == 10 + 4  # the ten and the honest programs


def test_samples_and_pass_at_k(backend: Bubblewrap, ten: tuple[Problem, ...], tmp_path: Path) -> None:
    settings = HumanEvalSettings(samples=4, temperature=0.8, k=(1, 2, 4), cpu_seconds=1)
    answers = {"HumanEval/0#0": WRONG, "HumanEval/0#2": WRONG, "HumanEval/1": WRONG}
    engine = Scripted(ten[:2], answers, rows=6)
    outcome = measure(engine, tmp_path, backend, settings)
    assert outcome.counts() == {"HumanEval/0": (4, 2), "HumanEval/1": (4, 0)}
    # Of two of four samples, one passes unless both are the wrong ones: 1 - 1/6.
    assert [outcome.pass_at(k) for k in (1, 2, 4)] == pytest.approx([0.25, 5 / 12, 0.5])
    assert engine.asked == [2]  # 3 problems of 4 samples fill two batches of 6; there are but two


def test_an_interrupted_run_continues_in_whole_batches(
    backend: Bubblewrap, ten: tuple[Problem, ...], tmp_path: Path
) -> None:
    whole = measure(Scripted(ten), tmp_path / "whole", backend)
    journal = (tmp_path / "whole" / JOURNAL_NAME).read_bytes().splitlines(keepends=True)
    assert len(journal) == 11
    (tmp_path / "cut").mkdir()
    # Killed while it wrote its sixth sample.
    (tmp_path / "cut" / JOURNAL_NAME).write_bytes(b"".join(journal[:6]) + journal[6][:30])
    engine = Scripted(ten)
    continued = measure(engine, tmp_path / "cut", backend)
    assert continued.samples == whole.samples
    known = {json.loads(line)["task_id"] for line in journal[1:6]}
    ordered = sorted(ten, key=lambda problem: len(problem.prompt))
    groups = [ordered[start : start + 4] for start in (0, 4, 8)]
    unfinished = [group for group in groups if not {problem.task_id for problem in group} <= known]
    assert engine.asked == [len(group) for group in unfinished]
    lines = (tmp_path / "cut" / JOURNAL_NAME).read_bytes().splitlines()
    assert len(lines) == 11
    assert len({json.loads(line)["task_id"] for line in lines[1:]}) == 10


def test_an_answer_that_is_no_text_is_wrong_and_the_run_finishes(
    backend: Bubblewrap, ten: tuple[Problem, ...], tmp_path: Path
) -> None:
    """Half of a surrogate pair: JSON can hold it as an escape, and no UTF-8 can."""
    answers = {"HumanEval/0": "    return '\ud800'\n", "HumanEval/1": "    return '\ude00\ud83d \U0001f600'\n"}
    first = measure(Scripted(ten[:3], answers), tmp_path, backend)
    assert [sample.status for sample in first.samples] == [Status.FAIL, Status.FAIL, Status.PASS]
    assert first.samples[0].text == "    return '\\ud800'\n"
    assert first.samples[1].text == "    return '\\ude00\\ud83d \U0001f600'\n"
    for sample in first.samples:
        sample.text.encode()
        sample.reason.encode()
    journal = tmp_path / JOURNAL_NAME
    # As earlier versions wrote it: the answer as it came.
    journal.write_bytes(journal.read_bytes().replace(b"\\\\ud800", b"\\ud800"))
    assert any("\ud800" in json.loads(line).get("text", "") for line in journal.read_bytes().splitlines())
    again = Scripted(ten[:3], answers)
    assert measure(again, tmp_path, backend).samples == first.samples
    assert again.asked == []


@pytest.mark.parametrize(
    "damage",
    [
        b"{",
        b"[1]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b"{}",
        b'{"task_id": "HumanEval/0"}',
        b'{"task_id": 1, "sample": 0, "text": "", "tokens": [], "finish": "stop", "status": "pass", "reason": ""}',
        b'{"task_id": "a", "sample": 0, "text": "", "tokens": 5, "finish": "stop", "status": "pass", "reason": ""}',
        b'{"task_id": "a", "sample": 0, "text": "", "tokens": [], "finish": "x", "status": "pass", "reason": ""}',
        b'{"task_id": "a", "sample": 0, "text": "", "tokens": [], "finish": "stop", "status": "x", "reason": ""}',
        b'{"task_id": "a", "sample": 0, "text": "", "tokens": [], "finish": "stop", "status": "pass", "reason": "", '
        b'"x": 1}',
    ],
)
@pytest.mark.parametrize("number", [0, 1])
def test_a_damaged_journal_is_named(
    backend: Bubblewrap, ten: tuple[Problem, ...], tmp_path: Path, damage: bytes, number: int
) -> None:
    measure(Scripted(ten[:1]), tmp_path, backend)
    journal = tmp_path / JOURNAL_NAME
    lines = journal.read_bytes().splitlines()
    lines[number] = damage
    journal.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(ArtifactError, match=rf"line {number + 1} is not what|belongs to another run") as caught:
        measure(Scripted(ten[:1]), tmp_path, backend)
    assert caught.value.exit_code == 5


def test_a_finished_run_asks_nothing_again(backend: Bubblewrap, ten: tuple[Problem, ...], tmp_path: Path) -> None:
    first = measure(Scripted(ten[:4]), tmp_path, backend)
    engine = Scripted(ten[:4])
    again = measure(engine, tmp_path, backend)
    assert again.samples == first.samples
    assert engine.asked == []
    assert again.proof is None


def test_another_runs_journal_is_refused(backend: Bubblewrap, ten: tuple[Problem, ...], tmp_path: Path) -> None:
    measure(Scripted(ten[:2]), tmp_path, backend)
    with pytest.raises(StaleJournalError, match="engine changed"):
        measure(Scripted(ten[:2], version="2"), tmp_path, backend)
    with pytest.raises(StaleJournalError, match="sampling changed"):
        measure(Scripted(ten[:2]), tmp_path, backend, HumanEvalSettings(cpu_seconds=1, max_tokens=7))
    with pytest.raises(StaleJournalError, match="prompts changed"):
        measure(Scripted(ten[:3]), tmp_path, backend)


def test_infrastructure_is_not_the_models_failure(
    backend: Bubblewrap, ten: tuple[Problem, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = JudgePool.submit

    def flaky(self: JudgePool, check: object, program: str, limits: object) -> object:
        if program.startswith(ten[1].prompt):
            check = type(ten[1].check())("def check(", "f")  # cannot be executed: the data set's fault
        return real(self, check, program, limits)  # type: ignore[arg-type]

    monkeypatch.setattr(run_module, "prove", lambda *_: Proof("bubblewrap", 0, 0, 0.0))
    with monkeypatch.context() as broken:
        broken.setattr(JudgePool, "submit", flaky)
        outcome = measure(Scripted(ten[:4], {"HumanEval/0": WRONG}), tmp_path, backend)
    assert outcome.unjudged() == ("HumanEval/1",)
    assert outcome.counts().keys() == {"HumanEval/0", "HumanEval/2", "HumanEval/3"}
    assert outcome.pass_at(1) == pytest.approx(2 / 3)
    # It was not kept, so the same command tries it again.
    engine = Scripted(ten[:4], {"HumanEval/0": WRONG})
    again = measure(engine, tmp_path, backend)
    assert engine.asked == [4]
    assert again.unjudged() == ()
    assert again.pass_at(1) == pytest.approx(3 / 4)


def test_without_proof_no_answer_is_judged(
    backend: Bubblewrap, ten: tuple[Problem, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof_module, "FORGERIES", HONEST[:1])  # a forgery that passes
    engine = Scripted(ten)
    with pytest.raises(SandboxError, match="failed its proof"):
        measure(engine, tmp_path, backend)
    assert engine.asked == []


def test_prompts_are_hashed_as_rendered(backend: Bubblewrap, ten: tuple[Problem, ...], tmp_path: Path) -> None:
    outcome = measure(Scripted(ten[:1]), tmp_path, backend)
    # sha256sum of the prompt of HumanEval/0 as the data set has it.
    assert outcome.prompts == {"HumanEval/0": "00b2e074e127a6a9d1376278bef732933760ab706057ec755a8c2642217b557a"}


def test_an_interruption_ends_running_candidates(backend: Bubblewrap, ten: tuple[Problem, ...], tmp_path: Path) -> None:
    began: list[float] = []

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "HumanEval" and done >= 1:
            began.append(time.monotonic())
            raise KeyboardInterrupt

    sleeper = "    import time\n    time.sleep(600)\n"
    shortest = min(ten, key=lambda problem: len(problem.prompt))  # it is completed first
    answers = {problem.task_id: sleeper for problem in ten if problem is not shortest}
    settings = HumanEvalSettings(cpu_seconds=60)
    before = descendants(os.getpid())
    with pytest.raises(KeyboardInterrupt):
        run(Scripted(ten, answers), ten, settings, tmp_path, backend=backend, seed=0, progress=interrupt)
    assert time.monotonic() - began[0] < 5.0
    assert not survivors(descendants(os.getpid()) - before)


KILLED = """
import sys
from pathlib import Path
from qconv.evaluation.humaneval.dataset import load_problems
from qconv.evaluation.humaneval import run as run_module
from qconv.evaluation.humaneval.settings import HumanEvalSettings
from qconv.evaluation.sandbox.bubblewrap import Bubblewrap
from qconv.evaluation.sandbox.forgeries import FORGERIES, HONEST
from qconv.evaluation.sandbox.pool import JudgePool
from qconv.evaluation.sandbox.proof import Proof
from tests.evaluation.humaneval.test_run import Scripted

run_module.prove = lambda *_: Proof("bubblewrap", 0, 0, 0.0)
problems = load_problems()[:6]
ordered = sorted(problems, key=lambda problem: len(problem.prompt))
answers = {problem.task_id: "    while True: pass\\n" for problem in ordered[3:]}
settings = HumanEvalSettings(cpu_seconds=600)
run_module.run(Scripted(problems, answers), problems, settings, Path(sys.argv[1]), backend=Bubblewrap.find(), seed=0)
"""


def test_a_killed_run_leaves_no_process_and_continues(
    backend: Bubblewrap, ten: tuple[Problem, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
    journal = tmp_path / JOURNAL_NAME
    family: set[int] = set()
    try:
        # Three samples are kept, and two candidates of four processes each run without end.
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            family = descendants(process.pid)
            if len(family) >= 8 and journal.exists() and len(journal.read_bytes().splitlines()) == 4:
                break
            time.sleep(0.05)
        assert len(family) >= 8
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        assert not survivors(family)
    finally:
        process.kill()
        process.wait()
    monkeypatch.setattr(run_module, "prove", lambda *_: Proof("bubblewrap", 0, 0, 0.0))
    outcome = measure(Scripted(ten[:6]), tmp_path, backend, HumanEvalSettings(cpu_seconds=600))
    assert outcome.statuses() == {Status.PASS: 6}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k": (1, 10)}, "pass@10 needs at least as many samples"),
        ({"samples": 5}, "all the same"),
        ({"problems": 165}, "less than or equal to 164"),
        ({"prompts": "chat"}, "Extra inputs"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        HumanEvalSettings.model_validate(values)


def test_progress_moves_while_a_batch_is_decoded(backend: Bubblewrap, ten: tuple[Problem, ...], tmp_path: Path) -> None:
    class Telling(Scripted):
        def complete(self, prompts: Sequence[Prompt], sampling: Sampling, step: Step = silent) -> Iterator[Completion]:
            for share in (0.25, 0.5):
                step(share)
            yield from super().complete(prompts, sampling)

    seen: list[tuple[int, int]] = []
    settings = HumanEvalSettings(cpu_seconds=1, max_tokens=100)

    def told(what: str, done: int, total: int) -> None:
        if what == "HumanEval":
            seen.append((done, total))

    run(Telling(ten), ten, settings, tmp_path, backend=backend, seed=0, progress=told)
    done = [one for one, _ in seen]
    assert done == sorted(done)
    assert {total for _, total in seen} == {1000}
    assert {100, 200, 500, 600, 850} <= set(done), "a quarter and a half of each batch of four; the last has two"
    assert done[-1] == 1000
