"""The first screen: what all runs come to, which build to take, and builds by gates."""

from __future__ import annotations

from pathlib import Path

import pytest

from qconv.evaluation.history import History
from qconv.evaluation.record import Outcome, Run, Unmeasured, Verdict
from qconv.evaluation.report.overview import overview
from qconv.evaluation.report.page import html, markdown
from qconv.evaluation.report.view import RunView, told_apart, view
from tests.evaluation.report.conftest import Write

SENTENCES: dict[str, str] = {
    "pass": "No regression: all 2 builds passed every gate.",
    "regression": "Regression: b (1 of 2 builds).",
    "corrupt": "Corrupt: b (1 of 2 builds).",
    "inconclusive": "Cannot tell for b (1 of 2 builds); none is worse.",
    "not gated": "Measured, not judged by gates: b.",
}


def judged(run: Run, outcome: Outcome, size: int = 9 * 10**6) -> Run:
    passed = tuple(gate.model_copy(update={"status": "pass"}) for gate in run.gates)
    verdict = Verdict(outcome=outcome, sentence=outcome)
    return run.model_copy(
        update={
            "build": run.build.model_copy(update={"size": size}),
            "verdict": verdict,
            "gates": passed if outcome == "pass" else run.gates,
        }
    )


def two(write: Write, tmp_path: Path, outcome: Outcome, kld: float = 0.002) -> list[RunView]:
    runs = [judged(write("a", 0.001), "pass", 16 * 10**6), judged(write("b", kld), outcome)]
    return [view(tmp_path / name, run, name=name) for name, run in zip("ab", runs, strict=True)]


@pytest.mark.parametrize("outcome", SENTENCES)
def test_the_verdict_names_the_worst_builds(outcome: Outcome, tmp_path: Path, write: Write) -> None:
    assert overview(two(write, tmp_path, outcome)).verdict == SENTENCES[outcome]


def test_advice_is_of_builds_that_pass(tmp_path: Path, write: Write) -> None:
    assert overview(two(write, tmp_path, "pass")).advice == (
        "Nearest to the reference: a, 0.00100 nats a token at 16.0 MB.",
        "Smallest that passes: b, 0.00200 nats a token at 9.00 MB (30.1 % of the reference's size).",
    )


def test_a_build_that_fails_is_not_recommended(tmp_path: Path, write: Write) -> None:
    (advice,) = overview(two(write, tmp_path, "regression", kld=0.0001)).advice
    assert advice.startswith("a is the smallest that passes")


def test_the_reference_itself_is_no_build_to_choose(tmp_path: Path, write: Write) -> None:
    views = two(write, tmp_path, "pass")
    run = write("itself", 1e-9)
    assert run.reference is not None
    same = judged(
        run.model_copy(update={"build": run.build.model_copy(update={"sha256": run.reference.sha256})}), "pass"
    )
    found = overview([view(tmp_path / "itself", same, name="bf16"), *views])
    assert not any("bf16" in line for line in found.advice)
    assert found.charts[0].svg.count('class="point') == 2
    assert found.charts[0].note.endswith("the reference has 29.9 MB.")


def test_one_build_has_no_chart_and_its_own_verdict(tmp_path: Path, write: Write) -> None:
    found = overview([view(tmp_path / "run", write())])
    assert found.charts == ()
    assert found.verdict == (
        "Regression: 1 of 3 gates failed. Perplexity over the reference's (stdlib) is +20.0 %, the limit -95 %. "
        "stdlib: ppl.ratio is fail | said"
    )


def test_a_build_without_a_run_is_named_and_no_verdict_passes(tmp_path: Path, write: Write) -> None:
    views, absent = two(write, tmp_path, "pass"), [("c", "no such <model>")]
    found = overview(views, absent)
    assert found.verdict == f"{SENTENCES['pass']} c could not be measured."
    assert found.style == "unsure"
    assert "c: no such &lt;model&gt;" in html(views, absent)
    assert "c could not be measured" in markdown(views, absent)


def test_cells_have_signs_values_and_trends(tmp_path: Path, write: Write) -> None:
    with History.open(tmp_path / "history") as history:
        for day in (1, 2):
            run = write(str(day), 0.001 * day, started=f"2026-01-0{day}T00:00:00+00:00")
            history.add(tmp_path / str(day), run)
        (matrix,) = overview([view(tmp_path / "2", run, history)]).matrices
    assert [name for name, _ in matrix.head] == [
        *("build", "size", "KL divergence", "Perplexity over the reference's", "Solved at the first attempt"),
    ]
    (row,) = matrix.rows
    assert [(cell.sign, cell.text) for cell in row] == [
        *(("✗", "tiny-awq"), ("", "9.43 MB"), ("✓", "pass"), ("✗", "fail"), ("?", "cannot tell")),
    ]
    assert row[2].notes == ("0.00200",)
    assert "the last 2 runs" in row[2].spark
    assert row[2].target == "b1g1"


def test_builds_of_one_name_are_told_apart(tmp_path: Path, write: Write) -> None:
    runs: list[Run] = []
    for digit, name in (("2", "awq"), ("3", "fp8"), ("3", "fp8")):
        run = write(f"{name}{len(runs)}")
        changes = {"name": "build", "path": f"/night/{name}/build", "sha256": digit * 64}
        runs.append(run.model_copy(update={"build": run.build.model_copy(update=changes)}))
    views = [view(tmp_path / name, run) for name, run in zip(("awq0", "fp81", "fp82"), runs, strict=True)]
    assert [one.name for one in told_apart(views)] == ["awq/build", "fp8/build", "fp8/build"]
    assert told_apart(views)[0].heading.startswith("awq/build: awq layout")
    assert [one.name for one in told_apart(views[1:])] == ["build", "build"], "one build, measured twice"


def test_what_was_not_measured_is_neither_passed_nor_empty(tmp_path: Path, write: Write) -> None:
    whole, run = write("whole"), write("less")
    left = Unmeasured(name="humaneval", kind="humaneval", reason="no sandbox.")
    passed = Verdict(outcome="pass", sentence="passed")
    changes = {"tasks": run.tasks[:1], "unmeasured": (left,), "gates": run.gates[:1], "verdict": passed}
    less = run.model_copy(update=changes)
    views = [
        view(tmp_path / "whole", whole.model_copy(update={"gates": whole.gates[:1]})),
        view(tmp_path / "less", less),
    ]
    (matrix,) = overview(views).matrices
    assert [row[-1].text for row in matrix.rows] == ["66.7 %", "not measured"]
    assert views[1].verdict == "No regression: the gate passed. Not measured: humaneval."
