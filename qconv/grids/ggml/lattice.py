"""The lattices of IQ1, IQ2 and IQ3: of all combinations of a few levels, the points that a code can name.

A point stands for the magnitudes of four or eight weights, or in IQ1 for eight of -1, 0 and 1. The nearest one,
importance and all, is found exactly, and not by looking at every point: a point's score is a sum over its elements, so
it splits into that of a low and of a high half. Of the points that share a high half only the one with the best low
half can win.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from gguf.quants import IQ1_M, IQ1_S, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS
from torch import Tensor

from qconv.core.once import MadeOnce
from qconv.grids.ggml.block_types import GgmlType
from qconv.grids.ggml.numeric import sum_of_halves
from qconv.grids.ggml.scaled import Moments
from qconv.grids.ggml.trials import best_trial

_GRIDS = {
    GgmlType.IQ1_S: IQ1_S,
    GgmlType.IQ1_M: IQ1_M,
    GgmlType.IQ2_XXS: IQ2_XXS,
    GgmlType.IQ2_XS: IQ2_XS,
    GgmlType.IQ2_S: IQ2_S,
    GgmlType.IQ3_XXS: IQ3_XXS,
    GgmlType.IQ3_S: IQ3_S,
}

_RUN = 8
"""Points that share a high half are looked at in runs of so many: whole rows for torch, and little padding."""

_SCORES = 1 << 19
"""Scores held at a time: two megabytes, which a processor's second-level cache takes."""

_DEVICE_SCORES = 1 << 27


@dataclass(frozen=True, slots=True)
class Lattice:
    """The points of a type, in the order of their codes.

    Attributes:
        points: float32 [points, elements].
        levels: The values that an element can have, ascending: float32 [levels].
        low: The place of each point's low half among all combinations of levels, the last element's changing fastest:
            int64 [runs * _RUN]. Short runs repeat their last point.
        high: The same of the high half that a run shares: int64 [runs].
        starts: The code of each run's first point: int64 [runs].
    """

    points: Tensor
    levels: Tensor
    low: Tensor
    high: Tensor
    starts: Tensor

    @property
    def elements(self) -> int:
        """Weights that a point stands for."""
        return self.points.shape[1]

    def nearest(self, linear: Tensor, quadratic: Tensor) -> Tensor:
        """The code of the point g with the largest ``sum linear * g - quadratic * g^2``; of equals the first.

        Args:
            linear: float32 [elements, groups].
            quadratic: The same shape.

        Returns:
            int64 [groups].
        """
        scores = _SCORES if linear.device.type == "cpu" else _DEVICE_SCORES
        step = scores // len(self.low)
        pieces = [slice(start, start + step) for start in range(0, linear.shape[1], step)]
        return torch.cat([self._nearest(linear[:, piece], quadratic[:, piece]) for piece in pieces])

    def _nearest(self, linear: Tensor, quadratic: Tensor) -> Tensor:
        levels = self.levels.view(1, -1, 1)
        scores = (linear.unsqueeze(1) - quadratic.unsqueeze(1) * levels).mul_(levels)  # [elements, levels, groups]
        half = self.elements // 2
        low, high = _combined(scores[:half]), _combined(scores[half:])
        best_low = low.index_select(0, self.low).view(len(self.high), _RUN, -1).amax(1)
        run = best_trial(best_low.add_(high.index_select(0, self.high)))
        candidates = self.low.view(-1, _RUN).index_select(0, run).t()
        return self.starts.index_select(0, run) + best_trial(low.gather(0, candidates))


def _combined(scores: Tensor) -> Tensor:
    """The score of every combination of levels: [2 or 4 elements, levels, groups] -> [combinations, groups]."""
    while len(scores) > 1:
        pairs = scores.view(-1, 2, *scores.shape[1:])
        scores = (pairs[:, 0].unsqueeze(2) + pairs[:, 1].unsqueeze(1)).flatten(1, 2)
    return scores[0]


def magnitudes(type: GgmlType) -> tuple[float, ...]:
    """The levels of a type's lattice, ascending."""
    return tuple(map(float, _GRIDS[type].grid_map))


@MadeOnce
def lattice(type: GgmlType, device: torch.device) -> Lattice:
    """A type's lattice, as the gguf package has it."""
    grid = _GRIDS[type]
    grid.init_grid()  # type: ignore[no-untyped-call]  # gguf does not say what it returns
    points = np.asarray(grid.grid, dtype=np.float32).reshape(grid.grid_shape)
    levels = np.array(magnitudes(type), dtype=np.float32)
    half = points.shape[1] // 2
    places = np.searchsorted(levels, points)
    weights = len(levels) ** np.arange(half - 1, -1, -1)
    low, high = places[:, :half] @ weights, places[:, half:] @ weights
    changes = np.flatnonzero(np.diff(high)) + 1  # points are sorted by their high half
    starts, runs = [], []
    for begin, end in zip([0, *changes], [*changes, len(points)], strict=True):
        for start in range(begin, end, _RUN):
            starts.append(start)
            runs.append(np.minimum(np.arange(start, start + _RUN), end - 1))
    return Lattice(
        torch.tensor(points, device=device),
        torch.tensor(levels, device=device),
        torch.tensor(low[np.concatenate(runs)], device=device),
        torch.tensor(high[starts], device=device),
        torch.tensor(starts, device=device),
    )


@dataclass(frozen=True, slots=True)
class Target:
    """What points are to approximate: magnitudes x of weights, some of them negative where a sign could not be had.

    Attributes:
        lattice: The points.
        x: ``importance * x``, float32 [elements of a sub-block, sub-blocks].
        importance: The same shape.
    """

    lattice: Lattice
    x: Tensor
    importance: Tensor

    def codes(self, scales: Tensor) -> Tensor:
        """The nearest points times each trial's scale: [trials, sub-blocks] -> int64 [trials, groups, sub-blocks]."""
        scales = scales.unsqueeze(1)
        linear = self._by_group(self.x * (scales + scales))
        quadratic = self._by_group(self.importance * (scales * scales))
        return self.lattice.nearest(linear, quadratic).view(len(scales), -1, scales.shape[2])

    def _by_group(self, trials: Tensor) -> Tensor:
        """[trials, elements, sub-blocks] -> [elements of a point, all groups]."""
        size = self.lattice.elements
        grouped = trials.view(len(trials), -1, size, trials.shape[2])
        return grouped.permute(2, 0, 1, 3).reshape(size, -1)

    def values(self, codes: Tensor) -> Tensor:
        """The points by their codes: int64 [trials, groups, sub-blocks] -> float32 [trials, elements, sub-blocks]."""
        return self.lattice.points[codes].transpose(2, 3).flatten(1, 2)

    def moments(self, scales: Tensor) -> Moments:
        """Of the nearest points for each trial's scale [trials, sub-blocks]."""
        return self.moments_of(self.codes(scales))

    def moments_of(self, codes: Tensor) -> Moments:
        """Of those points: int64 [trials, groups, sub-blocks]."""
        values = self.values(codes)
        return Moments(sum_of_halves(self.importance * (values * values), 1), sum_of_halves(self.x * values, 1))

    def lowest(self) -> Moments:
        """Of the lowest level everywhere: the one point that stands for equal magnitudes in every lattice."""
        level = self.lattice.levels[0]
        return Moments(sum_of_halves(self.importance) * (level * level), sum_of_halves(self.x) * level)
