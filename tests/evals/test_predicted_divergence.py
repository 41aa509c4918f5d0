"""The script of predicted divergences: ranks, what is asked for, and ways to give out bits that are apart."""

from __future__ import annotations

import json

import pytest

from evals.options import REPOSITORY
from evals.predicted_divergence import FACTORS, WITHIN, Row, shortfalls, spearman, summary, weighted
from qconv.planning.allocation import Choice
from qconv.sensitivity.palette import Unit


def row(predicted: float, kl: float) -> Row:
    return Row("build", predicted, kl, 0.0, 4.0, 100)


def test_rank_correlation_by_hand() -> None:
    assert spearman([1.0, 2.0, 3.0], [10.0, 20.0, 1000.0]) == pytest.approx(1.0)
    assert spearman([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    # 1 - 6 sum d^2 / (n (n^2 - 1)), two neighbours of four changed
    assert spearman([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]) == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_ratios_outside_of_one_to_three_and_wrong_orders_are_shortfalls() -> None:
    good = [row(1.0, 1.5), row(2.0, 3.0), row(3.0, 8.9)]
    assert shortfalls(good) == []
    assert summary(good)["largest_ratio"] == pytest.approx(8.9 / 3)
    assert len(shortfalls([row(1.0, 0.9), *good[1:]])) == 1
    assert len(shortfalls([*good[:2], row(3.0, 9.1)])) == 1
    assert any("rank" in problem for problem in shortfalls([row(1.0, 3.0), row(2.0, 2.5)]))


def test_the_results_have_what_is_asked_for() -> None:
    results = json.loads((REPOSITORY / "evals/results/predicted-divergence.json").read_text())["tiny-coder-moe"]
    for series in ("one size", "sizes"):
        rows = [Row(**row) for row in results[series]["builds"]]
        assert len(rows) == 8
        assert shortfalls(rows) == []
    sizes = [row["size"] for row in results["one size"]["builds"]]
    assert max(sizes) <= (1.0 + WITHIN) * min(sizes)


def test_every_way_gives_units_another_part_of_the_bits() -> None:
    units = [Unit("blk.0.attn_q.weight", 0, "attn_q", (), 8), Unit("blk.3.ffn_up.weight", 3, "ffn_up", (), 8)]
    units.append(Unit("output.weight", None, "output", (), 8))
    choices = {unit.name: [Choice("Q4_K", 4, 1.0)] for unit in units}
    found = {
        name: tuple(of[0].loss for of in weighted(choices, units, factor).values()) for name, factor in FACTORS.items()
    }
    assert found["by sensitivity"] == (1.0, 1.0, 1.0)
    assert len({tuple(one / losses[0] for one in losses) for losses in found.values()}) == len(FACTORS)
