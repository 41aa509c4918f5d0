"""Types by tensor under a budget of bytes: the least predicted divergence.

Each tensor has its choices, a size and a loss each; the sum of losses is to be least while that of sizes stays within
the budget. A price of a byte (a Lagrange multiplier) makes each tensor choose by itself; it is raised until the budget
holds, and what is left over is spent on the best of the single steps that still fit. Where that leaves much of the
budget, as with few tensors of few choices, all combinations are gone through by dynamic programming (Bellman 1957).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

Kind = TypeVar("Kind")

_FEW = 128
"""Units of which all combinations are gone through."""
_LEFT_OVER = 0.002
"""Of the budget, where that is not worth it."""
_GRID = 1 << 17


@dataclass(frozen=True, slots=True)
class Choice(Generic[Kind]):
    """What a tensor may become.

    Attributes:
        kind: A type.
        size: Bytes.
        loss: Its part of the predicted divergence.
    """

    kind: Kind
    size: int
    loss: float


def choose(units: Mapping[str, Sequence[Choice[Kind]]], budget: int) -> dict[str, Choice[Kind]] | None:
    """A choice for each unit by name; None where even the smallest of all do not fit.

    Args:
        units: By name, at least one choice each.
        budget: Bytes for all of them.
    """
    useful = {name: _useful(choices) for name, choices in units.items()}
    found = {name: choices[0] for name, choices in useful.items()}
    if _size(found) > budget:
        return None
    # Along the convex hulls, the steps that lower the loss most for a byte come first.
    steps = sorted(
        ((name, at) for name, choices in useful.items() for at in range(1, len(choices))),
        key=lambda step: _slope(useful[step[0]][step[1] - 1], useful[step[0]][step[1]]),
    )
    taken, size = dict.fromkeys(useful, 0), _size(found)
    for name, at in steps:
        larger = useful[name][at].size - useful[name][at - 1].size
        if taken[name] == at - 1 and size + larger <= budget:
            taken[name], size = at, size + larger
    found = _filled(units, {name: useful[name][at] for name, at in taken.items()}, budget)
    if len(units) > _FEW or budget - _size(found) <= _LEFT_OVER * budget:
        return found
    exact = _filled(units, _exact(units, budget), budget)
    return min(found, exact, key=_loss)


def _exact(units: Mapping[str, Sequence[Choice[Kind]]], budget: int) -> dict[str, Choice[Kind]]:
    """The least loss of all combinations; sizes above the smallest are rounded up to a fine grid of the budget."""
    least = {name: min(one.size for one in choices) for name, choices in units.items()}
    spare = budget - sum(least.values())
    step = max(1, spare // _GRID)
    losses = torch.zeros(spare // step + 1, dtype=torch.float64)  # by what may be spent
    picks: dict[str, Tensor] = {}
    for name, choices in units.items():
        best = torch.full_like(losses, math.inf)
        picks[name] = torch.zeros(len(losses), dtype=torch.int64)
        for index, one in enumerate(choices):
            spent = -(-(one.size - least[name]) // step)
            if spent < len(losses):
                made = torch.full_like(losses, math.inf)
                made[spent:] = losses[: len(losses) - spent] + one.loss
                picks[name][made < best] = index
                best = torch.minimum(best, made)
        losses = best
    left, found = len(losses) - 1, {}
    for name, choices in reversed([*units.items()]):
        found[name] = choices[int(picks[name][left])]
        left += (found[name].size - least[name]) // -step
    return found


def _filled(
    units: Mapping[str, Sequence[Choice[Kind]]], found: dict[str, Choice[Kind]], budget: int
) -> dict[str, Choice[Kind]]:
    """With the best of the single changes that still fit, until none lowers the loss."""
    size = _size(found)
    while True:
        best: tuple[float, str, Choice[Kind]] | None = None
        for name, choices in units.items():
            now = found[name]
            for other in choices:
                gain = now.loss - other.loss
                if gain > 0.0 and size + other.size - now.size <= budget:
                    worth = gain / max(1, other.size - now.size)
                    if best is None or worth > best[0]:
                        best = worth, name, other
        if best is None:
            return found
        _, name, other = best
        size += other.size - found[name].size
        found[name] = other


def curve(units: Mapping[str, Sequence[Choice[Kind]]], budgets: Sequence[int]) -> list[tuple[int, float]]:
    """For each budget that can be kept, the size that it takes and the predicted loss."""
    points = []
    for budget in budgets:
        found = choose(units, budget)
        if found is not None:
            points.append((_size(found), sum(one.loss for one in found.values())))
    return points


def _useful(choices: Sequence[Choice[Kind]]) -> list[Choice[Kind]]:
    """The lower convex hull of size and loss, the smallest first."""
    hull: list[Choice[Kind]] = []
    for one in sorted(choices, key=lambda choice: (choice.size, choice.loss)):
        if hull and one.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], one):
            hull.pop()
        if hull and hull[-1].size == one.size:
            hull.pop()
        hull.append(one)
    return hull


def _slope(smaller: Choice[Kind], larger: Choice[Kind]) -> float:
    """What a byte changes of the loss: negative."""
    return (larger.loss - smaller.loss) / max(1, larger.size - smaller.size)


def _loss(found: Mapping[str, Choice[Kind]]) -> float:
    return sum(one.loss for one in found.values())


def _size(found: Mapping[str, Choice[Kind]]) -> int:
    return sum(one.size for one in found.values())
