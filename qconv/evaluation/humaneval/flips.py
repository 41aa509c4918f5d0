"""Which problems two runs differ in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Flips:
    """Problems by what became of them between a run before and a run after, in the order of the data set.

    A problem counts as solved if more than half of its judged samples passed. Problems that only one run judged are in
    neither list.

    Attributes:
        lost: Solved before, not after.
        gained: Solved after, not before.
        compared: How many problems both runs judged.
    """

    lost: tuple[str, ...]
    gained: tuple[str, ...]
    compared: int


def flips(before: Mapping[str, tuple[int, int]], after: Mapping[str, tuple[int, int]]) -> Flips:
    """Compare counts (judged, passed) by problem."""
    common = [name for name in after if name in before]
    changes = [(name, _solved(before[name]), _solved(after[name])) for name in common]
    lost = tuple(name for name, was, now in changes if was and not now)
    gained = tuple(name for name, was, now in changes if now and not was)
    return Flips(lost, gained, len(common))


def first_difference(before: Sequence[int], after: Sequence[int]) -> int | None:
    """Index of the first token in which two answers differ; None if they are the same."""
    for index, (one, other) in enumerate(zip(before, after, strict=False)):
        if one != other:
            return index
    return None if len(before) == len(after) else min(len(before), len(after))


def _solved(count: tuple[int, int]) -> bool:
    judged, passed = count
    return 2 * passed > judged
