"""Gates in plain words."""

from __future__ import annotations

from typing import Any

import pytest

from qconv.evaluation.record import Gate
from qconv.evaluation.report.gate_rows import GateRow, gate_rows, verdict_line
from tests.evaluation.report.conftest import Write


def row(write: Write, **values: Any) -> GateRow:
    given = {
        "name": "stdlib: kld.mean",
        "against": "reference",
        "task": "stdlib",
        "metric": "kld.mean",
        "status": "pass",
        "value": 0.004,
        "low": 0.003,
        "high": 0.005,
        "limit": 0.05,
        "units": 30,
        "p_value": 1.0,
        "adjusted_p_value": 1.0,
        "detectable": 0.0002,
        "sentence": "as it is recorded",
    }
    (found,) = gate_rows(write().model_copy(update={"gates": (Gate.model_validate(given | values),)}), {})
    return found


def test_a_gate_that_passed_says_what_it_would_have_found(write: Write) -> None:
    found = row(write, noise=0.00001)
    assert (found.sign, found.word, found.name, found.where) == ("✓", "pass", "KL divergence", "stdlib")
    assert (found.value, found.between, found.limit) == ("0.00400 nats a token", "0.00300 to 0.00500", "0.05")
    assert (
        found.said == "0.000200 beyond the limit would probably have been found. Arithmetic alone makes 0.000010 of it."
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"status": "fail", "exceeded": True, "adjusted_p_value": 0.0004},
            "Chance does not explain it (p = 0.000400).",
        ),
        (
            {"status": "fail", "exceeded": True, "adjusted_p_value": 1e-30},
            "Chance does not explain it (p below 0.000001).",
        ),
        (
            {"status": "inconclusive", "exceeded": True, "adjusted_p_value": 0.2},
            "Beyond the limit, which chance can explain (p = 0.200).",
        ),
        ({"status": "inconclusive", "units": 4}, "Measured over only 4 units, too few to judge by."),
        ({"status": "not measured", "p_value": None}, "as it is recorded"),
        ({"detectable": 1e-19}, "Any excess would probably have been found."),
        ({"detectable": None}, "Nothing is known of what it would have missed."),
        (
            {"reruns": 1, "detectable": 1e-19},
            "Any excess would probably have been found. Measured twice: as it is recorded.",
        ),
    ],
)
def test_what_an_outcome_says(changes: dict[str, Any], said: str, write: Write) -> None:
    assert row(write, **changes).said == said


def test_a_gate_on_the_accepted_run_holds_perplexities(write: Write) -> None:
    found = row(
        write, metric="ppl.ratio", against="baseline", value=44.2, low=None, high=None, limit=44.4, baseline=44.1
    )
    assert (found.name, found.where) == ("Perplexity", "stdlib, against the accepted run")
    assert (found.value, found.limit, found.known) == ("44.2", "44.4", "accepted run: 44.1")
    ratio = row(lambda: write("other"), metric="ppl.ratio", value=1.01, low=None, high=None, limit=1.03)
    assert (ratio.value, ratio.limit) == ("+1.00 %", "+3 %")


def test_what_is_wrong_with_the_files_is_told_whole(write: Write) -> None:
    found = row(write, against="integrity", task=None, metric="problems", p_value=None, status="fail", value=1.0)
    assert (found.name, found.value, found.limit) == ("Files are whole", "-", "-")
    assert found.said == "as it is recorded"


def test_a_verdict_without_gates_is_as_recorded(write: Write) -> None:
    run = write()
    bare = run.model_copy(update={"gates": (), "verdict": run.verdict.model_copy(update={"outcome": "not gated"})})
    assert verdict_line(bare, ()) == "Regression: 1 of 3 gates failed"
