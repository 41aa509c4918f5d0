"""The search of types whose weights are ``scale * value(code)``: Q4_0, Q5_0, IQ4_NL, and Q3_K, Q6_K and IQ4_XS, where

    scale = d * k   with an integer k of a sub-block and a float16 d of the super-block.

Values are a range of integers, or the 16 of a codebook. As in :mod:`qconv.grids.ggml.affine`, trials of several scales
alternate between the nearest values and the least-squares scale. In a super-block the best scale of each sub-block is
rounded to what can be stored; trying the integers beside it would gain less than half a percent.

Tensors are float32 [elements, sub-blocks, blocks] (weights, values) and [sub-blocks, blocks] (per sub-block); a leading
dimension of trials may precede.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qconv.grids.ggml.numeric import as_half, reciprocal
from qconv.grids.ggml.superblock import nearest_integers, shared_scale
from qconv.grids.ggml.trials import best_trial, pick, survivors

_SURVIVORS = 2


@dataclass(frozen=True, slots=True)
class ScaledGrid:
    """What a type can hold, and where its search begins.

    Attributes:
        nearest: Replaces multiples of the scale by the nearest values, in place.
        top: Integer scales reach from ``-top`` to ``top - 1``; None where a block has its own float16 scale.
        reaches: Each trial gives the weight of the largest magnitude one of these values. The most useful stand first;
            the second half is tried only where importance differs, which makes more of the weights expendable.
    """

    nearest: Callable[[Tensor], Tensor]
    top: int | None
    reaches: tuple[float, ...]

    def starts(self, weighted: bool) -> tuple[float, ...]:
        """The reaches that are tried."""
        return self.reaches if weighted else self.reaches[: len(self.reaches) // 2]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Values, and what they are multiplied by.

    Attributes:
        values: float32 [elements, sub-blocks, blocks].
        scales: float32 [sub-blocks, blocks]: the integers k of a super-block, or a block's float16 scale.
        d: float32 [blocks]: float16 numbers; 1 without super-blocks.
    """

    values: Tensor
    scales: Tensor
    d: Tensor


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over a sub-block's values q, weights x and importance: all that a loss needs to know of the values."""

    qq: Tensor
    xq: Tensor

    def optimum(self) -> Tensor:
        """The scale of the least squared error."""
        return self.xq * reciprocal(self.qq)

    def gain(self, scale: Tensor) -> Tensor:
        """By how much the squared error falls below that of zeros: the more the better."""
        return scale * (2.0 * self.xq - scale * self.qq)

    def pick(self, best: Tensor) -> Moments:
        """Of each sub-block the moments of one trial."""
        return Moments(pick(self.qq, best), pick(self.xq, best))


@dataclass(frozen=True, slots=True)
class Source:
    """Weights to approximate."""

    weights: Tensor
    importance: Tensor | None
    grid: ScaledGrid

    def values(self, scale: Tensor) -> Tensor:
        """The nearest values for a scale."""
        return self.grid.nearest(self.weights * reciprocal(scale))

    def moments(self, scales: Tensor) -> Moments:
        """Of the nearest values for each trial's scale [trials, sub-blocks, blocks]."""
        found = Moments(torch.empty_like(scales), torch.empty_like(scales))
        for trial, scale in enumerate(scales):
            values = self.values(scale)
            weighted = values if self.importance is None else values * self.importance
            torch.sum(weighted * self.weights, 0, out=found.xq[trial])
            torch.sum(weighted.mul_(values), 0, out=found.qq[trial])
        return found


def encode(weights: Tensor, importance: Tensor | None, grid: ScaledGrid) -> Encoded:
    """Search values and scales.

    Args:
        weights: float32 [elements, sub-blocks, blocks].
        importance: The same shape, positive, or None.
        grid: What the type can hold.
    """
    source = Source(weights, importance, grid)
    scale, moments = best_of_reaches(source)
    if grid.top is None:
        scale = as_half(scale)
        return Encoded(source.values(scale), scale, torch.ones_like(scale[0]))
    d = shared_scale(scale, moments.qq, -grid.top, grid.top - 1)
    k = nearest_integers(scale, d, -grid.top, grid.top - 1)
    return Encoded(source.values(d * k), k, d)


def best_of_reaches(source: Source) -> tuple[Tensor, Moments]:
    """Of each sub-block the best real scale that the trials find."""
    low, high = source.weights.amin(0), source.weights.amax(0)
    largest = torch.where(high >= -low, high, low)
    reaches = source.grid.starts(weighted=source.importance is not None)
    scale = torch.stack([largest / reach for reach in reaches])
    moments = source.moments(scale)
    scale = moments.optimum()
    (scale,) = survivors(moments.gain(scale), _SURVIVORS, scale)
    moments = source.moments(scale)
    scale = moments.optimum()
    best = best_trial(moments.gain(scale))
    return pick(scale, best), moments.pick(best)
