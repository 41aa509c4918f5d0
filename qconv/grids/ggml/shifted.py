"""The search of IQ1_S and IQ1_M: a weight is ``scale * (g + shift)``, g being -1, 0 or 1 of a lattice's point, and

    scale = d * (2k + 1)   with an integer k of a sub-block from 0 to 7 and a float16 d of the super-block.

The shift is an eighth with a sign, which a sub-block has (IQ1_S) or each eight weights (IQ1_M); whichever of the two
leaves the smaller error is taken. Trials of several scales round every weight on its own, points being dear; from the
best one the nearest points are found, and their least-squares scale. The rest is as for IQ2 and IQ3
(:mod:`qconv.grids.ggml.signed`): d is chosen for the sub-blocks' scales, the integers around each one's optimum are
tried with points of their own, and d is fitted to what came out.

Tensors are float32 [elements, columns], a column being a sub-block, until the super-blocks [sub-blocks, blocks] matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qconv.grids.ggml.block_types import GgmlType
from qconv.grids.ggml.lattice import Lattice, lattice
from qconv.grids.ggml.numeric import reciprocal, square_root, sum_of_halves
from qconv.grids.ggml.odd_multiples import best_multiples, refit, shared_step
from qconv.grids.ggml.scaled import Moments

POINT = 8
"""Weights that a point stands for."""

SHIFT = 0.125
ENDS = (15.0, 13.0, 11.0, 9.0)
"""What the largest scale of a super-block is tried to become, in units of d; the first is 2k + 1 of three bits."""


@dataclass(frozen=True, slots=True)
class ShiftedGrid:
    """What a type can hold, and where its search begins.

    Attributes:
        type: Whose lattice.
        together: Weights that share a shift.
        means: A trial's scales over the root of the mean square.
    """

    type: GgmlType
    together: int
    means: tuple[float, ...]
    unit: float = 1.0

    def starts(self, weighted: bool) -> list[tuple[float, float]]:
        """What the largest magnitude and the root of the mean square contribute to each trial's scale."""
        return [(0.0, share) for share in self.means]

    @property
    def middle(self) -> float:
        """Of the magnitudes of the levels that are not zero."""
        return 1.0


@dataclass(frozen=True, slots=True)
class Encoded:
    """Points, shifts, and what they are multiplied by.

    Attributes:
        codes: int64 [groups of a sub-block, sub-blocks, blocks].
        negative: Of the shifts, bool of the same shape.
        k: float32 [sub-blocks, blocks], from 0 to 7.
        d: float32 [blocks]: float16 numbers.
    """

    codes: Tensor
    negative: Tensor
    k: Tensor
    d: Tensor


@dataclass(frozen=True, slots=True)
class Points:
    """The values ``g + shift`` [elements, columns] of codes, and which shifts are negative, [groups, columns]."""

    values: Tensor
    codes: Tensor
    negative: Tensor


@dataclass(frozen=True, slots=True)
class Source:
    """Weights to approximate, [elements, columns].

    Attributes:
        weights: As they are.
        importance: Positive.
        x: ``importance * weights``.
    """

    weights: Tensor
    importance: Tensor
    x: Tensor
    grid: ShiftedGrid
    lattice: Lattice

    @classmethod
    def of(cls, weights: Tensor, importance: Tensor, grid: ShiftedGrid) -> Source:
        return cls(weights, importance, importance * weights, grid, lattice(grid.type, weights.device))

    def free(self, scale: Tensor) -> Tensor:
        """Values without a lattice, for a scale [columns]."""
        multiples = self.weights * reciprocal(scale)
        above, below = ((multiples - shift).round_().clamp_(-1.0, 1.0).add_(shift) for shift in (SHIFT, -SHIFT))
        return torch.where(self._spread(self._better(above, below, scale)), below, above)

    def points(self, scale: Tensor) -> Points:
        """The nearest points for a scale [columns]."""
        above, codes_above = self._nearest(scale, SHIFT)
        below, codes_below = self._nearest(scale, -SHIFT)
        turned = self._better(above, below, scale)
        negative = turned.repeat_interleave(len(codes_above) // len(turned), 0)
        values = torch.where(self._spread(turned), below, above)
        return Points(values, torch.where(negative, codes_below, codes_above), negative)

    def nearest(self, scale: Tensor, shift: Tensor) -> Tensor:
        """The values of the nearest points with given shifts [columns]."""
        return self._nearest(scale, shift)[0]

    def moments(self, scales: Tensor) -> Moments:
        """Of the nearest points for each trial's scale [trials, columns]; a trial at a time, points being dear."""
        found = [self.moments_of(self.points(scale).values) for scale in scales]
        return Moments(torch.stack([one.qq for one in found]), torch.stack([one.xq for one in found]))

    def moments_of(self, values: Tensor) -> Moments:
        """Of values [elements, columns]."""
        return Moments(sum_of_halves(self.importance * (values * values)), sum_of_halves(self.x * values))

    def _nearest(self, scale: Tensor, shift: float | Tensor) -> tuple[Tensor, Tensor]:
        square = scale * scale
        linear = self.x * (scale + scale) - self.importance * (square * (2.0 * shift))
        quadratic = self.importance * square
        columns = scale.shape[0]
        grouped = [part.view(-1, POINT, columns).transpose(0, 1).reshape(POINT, -1) for part in (linear, quadratic)]
        codes = self.lattice.nearest(*grouped).view(-1, columns)
        return self.lattice.points[codes].transpose(1, 2).reshape(linear.shape).add_(shift), codes

    def _better(self, above: Tensor, below: Tensor, scale: Tensor) -> Tensor:
        """Whether the second values leave a smaller error than the first, of those that share a shift."""
        return self._gain(below, scale) > self._gain(above, scale)

    def _gain(self, values: Tensor, scale: Tensor) -> Tensor:
        multiples = values * scale
        gain = multiples * (2.0 * self.x - self.importance * multiples)
        return sum_of_halves(gain.view(-1, self.grid.together, gain.shape[1]), 1)

    def _spread(self, by_shift: Tensor) -> Tensor:
        return by_shift.repeat_interleave(self.grid.together, 0)


def encode(weights: Tensor, importance: Tensor | None, grid: ShiftedGrid) -> Encoded:
    """Search points, shifts and scales.

    Args:
        weights: float32 [elements, sub-blocks, blocks].
        importance: The same shape, positive, or None.
        grid: What the type can hold.
    """
    _, subblocks, blocks = weights.shape
    spread = torch.ones_like(weights) if importance is None else importance
    source = Source.of(weights.flatten(1), spread.flatten(1), grid)
    found = source.moments_of(source.points(best_of_starts(source, importance is not None)).values)
    wanted = found.optimum().clamp_(min=0.0).view(subblocks, blocks)
    step = shared_step(wanted, found.qq.view(subblocks, blocks), grid.unit, ENDS)
    multiples, moments = best_multiples(wanted, step, ENDS[0], source.moments)
    step = refit(multiples, moments, step, grid.unit)
    points = source.points((step * multiples).flatten())
    found = source.moments_of(points.values)
    moments = Moments(found.qq.view(wanted.shape), found.xq.view(wanted.shape))
    step = refit(multiples, moments, step, grid.unit)
    codes, negative = (part.view(-1, subblocks, blocks) for part in (points.codes, points.negative))
    return Encoded(codes, negative, (multiples - 1.0) / 2.0, step / grid.unit)


def best_of_starts(source: Source, weighted: bool) -> Tensor:
    """Of each sub-block the best real scale that the trials find without a lattice: [columns]."""
    peak = source.weights.abs().amax(0)
    mean = square_root(sum_of_halves(source.x * source.weights) / sum_of_halves(source.importance))
    best, most = torch.zeros_like(peak), torch.full_like(peak, -torch.inf)
    for of_peak, of_mean in source.grid.starts(weighted):
        moments = source.moments_of(source.free(peak * of_peak + mean * of_mean))
        scale = moments.optimum().clamp_(min=0.0)
        gain = moments.gain(scale)
        best, most = torch.where(gain > most, scale, best), torch.maximum(gain, most)
    return best
