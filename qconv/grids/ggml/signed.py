"""The search of IQ2 and IQ3: a weight is ``sign * scale * magnitude``, the magnitudes being a point of a lattice, and

    scale = d * unit * (2k + 1)   with an integer k of a sub-block and a float16 d of the super-block.

Trials of several scales find the nearest points of each sub-block and the least-squares scale for them; the best is
kept. Then d is chosen for the sub-blocks' scales, the integers around each one's optimum are tried with points of their
own, and d is fitted to what came out.

Some types store the signs of only seven weights in eight: the number of negative ones is even. Where it would be odd,
the weight whose wrong sign costs least gets it. The points are then searched with that weight below zero.

Tensors are float32 [elements, columns], a column being a sub-block, until the super-blocks [sub-blocks, blocks] matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qconv.grids.ggml.block_types import GgmlType
from qconv.grids.ggml.lattice import Lattice, Target, lattice, magnitudes
from qconv.grids.ggml.numeric import reciprocal, square_root, sum_of_halves
from qconv.grids.ggml.odd_multiples import best_multiples, refit, shared_step
from qconv.grids.ggml.scaled import Moments
from qconv.grids.ggml.trials import best_trial, pick

SIGNS = 8
"""Weights whose signs stand in one byte."""

ENDS = (31.0, 29.0, 27.0, 25.0, 23.0, 21.0)
"""What the largest scale of a super-block is tried to become, in units of d: smaller ones leave it room to grow.
The first is 2k + 1 of a k of four bits."""


@dataclass(frozen=True, slots=True)
class SignedGrid:
    """What a type can hold, and where its search begins.

    Attributes:
        type: Whose lattice.
        unit: A scale is an odd multiple of this times d.
        even: Whether the number of negative weights in eight must be even.
        peaks: A trial lets the largest level times one of these stand for the largest magnitude.
        means: A trial lets the middle of the levels times one of these stand for the root of the mean square. Only
            where importance differs, which makes the largest magnitudes expendable.
        weighted_peaks: More of ``peaks``, for such weights too.
    """

    type: GgmlType
    unit: float
    even: bool
    peaks: tuple[float, ...]
    means: tuple[float, ...]
    weighted_peaks: tuple[float, ...]

    def starts(self, weighted: bool) -> list[tuple[float, float]]:
        """What the largest magnitude and the root of the mean square contribute to each trial's scale."""
        largest, middle = magnitudes(self.type)[-1], self.middle
        peaks, means = (self.peaks + self.weighted_peaks, self.means) if weighted else (self.peaks, ())
        return [(1.0 / (largest * share), 0.0) for share in peaks] + [(0.0, 1.0 / (middle * share)) for share in means]

    @property
    def middle(self) -> float:
        """Of the levels."""
        levels = magnitudes(self.type)
        return (levels[0] + levels[-1]) / 2.0


@dataclass(frozen=True, slots=True)
class Encoded:
    """Points, signs, and what they are multiplied by.

    Attributes:
        codes: int64 [groups of a sub-block, sub-blocks, blocks].
        negative: bool [elements, sub-blocks, blocks].
        k: float32 [sub-blocks, blocks], from 0 to 15.
        d: float32 [blocks]: float16 numbers.
    """

    codes: Tensor
    negative: Tensor
    k: Tensor
    d: Tensor


@dataclass(frozen=True, slots=True)
class Flips:
    """One weight of each eight, and whether its sign is wrong: int64 and bool [eights, 1, columns]."""

    which: Tensor
    odd: Tensor

    def applied(self, tensor: Tensor, opposite: Callable[[Tensor], Tensor]) -> Tensor:
        """A tensor [elements, columns] with those elements turned."""
        eights = tensor.view(-1, SIGNS, tensor.shape[1])
        chosen = eights.gather(1, self.which)
        turned = torch.where(self.odd, opposite(chosen), chosen)
        return eights.scatter(1, self.which, turned).view(tensor.shape)


@dataclass(frozen=True, slots=True)
class Source:
    """Weights to approximate, [elements, columns].

    Attributes:
        negative: Their signs.
        magnitudes: Without them.
        importance: Positive.
        x: ``importance * magnitudes``.
    """

    negative: Tensor
    magnitudes: Tensor
    importance: Tensor
    x: Tensor
    grid: SignedGrid
    lattice: Lattice

    @classmethod
    def of(cls, weights: Tensor, importance: Tensor, grid: SignedGrid) -> Source:
        magnitudes = weights.abs()
        points = lattice(grid.type, weights.device)
        return cls(weights < 0.0, magnitudes, importance, importance * magnitudes, grid, points)

    def target(self, flips: Flips | None) -> Target:
        """What the points are to approximate."""
        x = self.x if flips is None else flips.applied(self.x, torch.neg)
        return Target(self.lattice, x, self.importance)

    def signs(self, flips: Flips | None) -> Tensor:
        """The signs to store, true for negative."""
        return self.negative if flips is None else flips.applied(self.negative, torch.logical_not)

    def flips(self, scale: Tensor, candidates: int = 1) -> Sequence[Flips | None]:
        """The weights whose sign is the cheapest to turn at a scale [columns], and the next cheapest.

        A turned weight becomes the lowest level with the other sign. What that costs is counted against its own sign,
        where only what lies below the lowest level has an error worth counting.
        """
        if not self.grid.even:
            return [None]
        lowest = self.lattice.levels[0]
        multiples = self.magnitudes * reciprocal(scale)
        short = (lowest - multiples).clamp_(min=0.0)
        cost = multiples.add_(lowest).square_().sub_(short.square_()).mul_(self.importance)
        cost = cost.view(-1, SIGNS, cost.shape[1])
        odd = self.negative.view(cost.shape).sum(1, keepdim=True) % 2 == 1
        found = []
        for _ in range(candidates):
            cheapest = cost.min(1, keepdim=True).indices
            found.append(Flips(cheapest, odd))
            cost.scatter_(1, cheapest, torch.inf)
        return found


def encode(weights: Tensor, importance: Tensor | None, grid: SignedGrid) -> Encoded:
    """Search points, signs and scales.

    Args:
        weights: float32 [elements, sub-blocks, blocks].
        importance: The same shape, positive, or None.
        grid: What the type can hold.
    """
    _, subblocks, blocks = weights.shape
    spread = torch.ones_like(weights) if importance is None else importance
    source = Source.of(weights.flatten(1), spread.flatten(1), grid)
    scale, curvature = best_of_starts(source, weighted=importance is not None)
    wanted = scale.view(subblocks, blocks)
    step = shared_step(wanted, curvature.view(subblocks, blocks), grid.unit, ENDS)
    (flips,) = source.flips(scale)
    multiples, moments = best_multiples(wanted, step, ENDS[0], source.target(flips).moments)
    step = refit(multiples, moments, step, grid.unit)
    codes, negative, moments = _best_points(source, step * multiples)
    step = refit(multiples, moments, step, grid.unit)
    return Encoded(
        codes.view(-1, subblocks, blocks),
        negative.view(weights.shape),
        (multiples - 1.0) / 2.0,
        step / grid.unit,
    )


def best_of_starts(source: Source, weighted: bool) -> tuple[Tensor, Tensor]:
    """Of each sub-block the best real scale that the trials find, and the curvature of its loss there: [columns]."""
    peak = source.magnitudes.amax(0)
    mean_square = sum_of_halves(source.x * source.magnitudes) / sum_of_halves(source.importance)
    mean = square_root(mean_square)
    (flips,) = source.flips(mean * (1.0 / source.grid.middle))
    target = source.target(flips)
    found, lowest = (
        target.moments(
            torch.stack([peak * of_peak + mean * of_mean for of_peak, of_mean in source.grid.starts(weighted)])
        ),
        target.lowest(),
    )
    moments = Moments(torch.cat([found.qq, lowest.qq.unsqueeze(0)]), torch.cat([found.xq, lowest.xq.unsqueeze(0)]))
    scale = moments.optimum().clamp_(min=0.0)
    best = best_trial(moments.gain(scale))
    return pick(scale, best), pick(moments.qq, best)


def nearest_points(source: Source, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int64 [groups, columns] and signs [elements, columns] of the best points for given scales."""
    codes, negative, _ = _best_points(source, scales)
    return codes, negative


def _best_points(source: Source, scales: Tensor) -> tuple[Tensor, Tensor, Moments]:
    """Codes [groups, columns] and signs [elements, columns] for scales [sub-blocks, blocks], and their moments."""
    scale = scales.flatten()
    first, *others = (_Points.at(source, scale, flips) for flips in source.flips(scale, candidates=2))
    for other in others:
        first = first.where_better(other)
    target = Target(
        source.lattice, torch.where(first.negative == source.negative, source.x, -source.x), source.importance
    )
    moments = target.moments_of(first.codes.unsqueeze(0))
    return first.codes, first.negative, Moments(moments.qq.view(scales.shape), moments.xq.view(scales.shape))


@dataclass(frozen=True, slots=True)
class _Points:
    """Codes [groups, columns], signs [elements, columns], and what each eight weights gain by them."""

    codes: Tensor
    negative: Tensor
    gain: Tensor

    @classmethod
    def at(cls, source: Source, scale: Tensor, flips: Flips | None) -> _Points:
        target = source.target(flips)
        codes = target.codes(scale.unsqueeze(0))
        multiples = target.values(codes).squeeze(0) * scale
        gain = multiples * (2.0 * target.x - target.importance * multiples)
        return cls(codes.squeeze(0), source.signs(flips), sum_of_halves(gain.view(-1, SIGNS, gain.shape[1]), 1))

    def where_better(self, other: _Points) -> _Points:
        """Of each eight weights the better ones; these where they are equal."""
        better = other.gain > self.gain
        codes = torch.where(_spread(better, self.codes), other.codes, self.codes)
        negative = torch.where(_spread(better, self.negative), other.negative, self.negative)
        return _Points(codes, negative, torch.maximum(self.gain, other.gain))


def _spread(eights: Tensor, onto: Tensor) -> Tensor:
    """What holds for eight weights for each row that is about some of them."""
    return eights.repeat_interleave(len(onto) // len(eights), 0)
