"""The script of files of a size: ratios and their intervals, bars, and the table of the documentation."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from evals.options import REPOSITORY
from evals.quality import Measured
from evals.target_sizes import BARS, CHOSEN, IMATRIX, MIXTURE, READY, READY_OF, ratio, shortfalls, table
from qconv.formats.gguf import ready

RESULTS = REPOSITORY / "evals/results/target-sizes.json"


def measured(kl: list[float]) -> Measured:
    values = np.array(kl)
    return Measured(np.full(len(values), 10.0), values, values, values)


def test_a_ratio_is_paired_over_documents() -> None:
    spread = np.linspace(1.0, 100.0, 40)
    half = ratio(("a", "b"), {"a": measured(list(spread / 2)), "b": measured(list(spread))})
    # A hundredfold spread of documents leaves no doubt where each has half.
    assert (half.ratio, half.low, half.high) == pytest.approx((0.5, 0.5, 0.5))
    other = ratio(("a", "b"), {"a": measured(list(spread[::-1] / 2)), "b": measured(list(spread))})
    assert other.ratio == pytest.approx(0.5)
    assert other.low < 0.45
    assert other.high > 0.55


def found(**changes: Any) -> dict[str, Any]:
    """A size class that keeps all bars by a hair."""
    ratios = [
        {"build": build, "baseline": baseline, "ratio": 0.9 * bar, "low": 0.8 * bar, "high": bar}
        for (build, baseline), bar in BARS.items()
    ]
    sizes = {IMATRIX: 100, MIXTURE: 100, READY: 100, CHOSEN: 100} | changes
    return {"ratios": ratios, "builds": [{"build": name, "size": size} for name, size in sizes.items()]}


@pytest.mark.parametrize("name", [READY, CHOSEN])
def test_a_file_larger_than_its_class_is_a_shortfall(name: str) -> None:
    assert shortfalls("Q4_K_M", found()) == []
    (problem,) = shortfalls("Q4_K_M", found(**{name: 101}))
    assert name in problem


@pytest.mark.parametrize("number", range(len(BARS)))
def test_an_interval_above_its_bar_is_a_shortfall(number: int) -> None:
    one = found()
    one["ratios"][number]["high"] *= 1.001
    (problem,) = shortfalls("Q2_K", one)
    assert problem.startswith("Q2_K: ")


def test_every_class_has_its_ready_mixture() -> None:
    assert {ready.READY[name] for name in READY_OF.values()} == set(READY_OF)


def test_the_documentation_has_the_table_of_the_results() -> None:
    results = json.loads(RESULTS.read_text())
    assert table(results) == RESULTS.with_suffix(".md").read_text()
    assert table(results) in (REPOSITORY / "docs" / "evidence" / "sizes.md").read_text()
    assert not [
        problem for one in results.values() for size in one["sizes"] for problem in shortfalls(size, one["sizes"][size])
    ]
