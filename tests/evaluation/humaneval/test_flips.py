"""Which problems were lost and gained."""

from __future__ import annotations

import pytest

from qconv.evaluation.humaneval.flips import Flips, first_difference, flips


def test_lost_and_gained() -> None:
    before = {"a": (1, 1), "b": (1, 0), "c": (1, 1), "d": (1, 1)}
    after = {"a": (1, 0), "b": (1, 1), "c": (1, 1), "e": (1, 1)}
    assert flips(before, after) == Flips(lost=("a",), gained=("b",), compared=3)
    assert flips(after, before) == Flips(lost=("b",), gained=("a",), compared=3)
    assert flips(before, before) == Flips((), (), 4)


def test_of_several_samples_most_must_pass() -> None:
    assert flips({"a": (4, 3), "b": (4, 3)}, {"a": (4, 2), "b": (3, 2)}).lost == ("a",)


@pytest.mark.parametrize(
    ("before", "after", "index"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [5], 0), ([], [], None)],
)
def test_first_difference(before: list[int], after: list[int], index: int | None) -> None:
    assert first_difference(before, after) == index
