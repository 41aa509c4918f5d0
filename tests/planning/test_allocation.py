"""Types under a budget: against every combination, never above, never worse than one type for all."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from qconv.planning.allocation import Choice, choose, curve

CHOICES = st.lists(st.tuples(st.integers(1, 50), st.floats(0.0, 10.0)), min_size=1, max_size=4)
UNITS = st.lists(CHOICES, min_size=1, max_size=4)


def units_of(drawn: list[list[tuple[int, float]]]) -> dict[str, list[Choice[int]]]:
    return {
        str(number): [Choice(kind, size, loss) for kind, (size, loss) in enumerate(choices)]
        for number, choices in enumerate(drawn)
    }


@given(UNITS, st.integers(1, 220))
def test_it_keeps_the_budget_and_comes_near_the_best_of_all_combinations(
    drawn: list[list[tuple[int, float]]], budget: int
) -> None:
    units = units_of(drawn)
    found = choose(units, budget)
    fitting = [
        sum(one.loss for one in combination)
        for combination in itertools.product(*units.values())
        if sum(one.size for one in combination) <= budget
    ]
    assert (found is None) == (not fitting)
    if found is None:
        return
    assert found.keys() == units.keys()
    assert all(found[name] in choices for name, choices in units.items())
    assert sum(one.size for one in found.values()) <= budget
    loss = sum(one.loss for one in found.values())
    if sum(one.size for one in found.values()) < 0.998 * budget:
        assert loss <= min(fitting) + 1e-9
    # Else what is lost to the best is at most one step of one unit: the bound of greedy filling along convex hulls.
    largest = max(max(one.loss for one in choices) for choices in units.values())
    assert loss <= min(fitting) + largest + 1e-9
    # No single change that fits would help.
    for name, choices in units.items():
        rest = sum(one.size for other, one in found.items() if other != name)
        assert all(one.loss >= found[name].loss for one in choices if rest + one.size <= budget)


def test_bits_go_where_they_count() -> None:
    cheap, dear = (
        [Choice(bits, bits * 10, weight * 4.0**-bits) for bits in (2, 3, 4, 6, 8)] for weight in (1.0, 500.0)
    )
    found = choose({"cheap": cheap, "dear": dear}, 100)
    assert found is not None
    assert {name: one.kind for name, one in found.items()} == {"cheap": 2, "dear": 8}
    assert sum(one.loss for one in found.values()) < 2 * 250.0 * 4.0**-5 + 4.0**-5  # of 5 bits each


def test_the_curve_falls() -> None:
    units = {str(number): [Choice(bits, bits * 8, 4.0**-bits) for bits in range(2, 9)] for number in range(5)}
    points = curve(units, range(0, 400, 20))
    assert len(points) > 10
    assert points[0][0] >= 80
    assert all(one[0] <= other[0] and one[1] >= other[1] for one, other in itertools.pairwise(points))
