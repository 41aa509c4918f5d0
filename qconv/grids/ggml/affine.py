"""The search of types whose weights are ``scale * code + base``: Q4_1 and Q5_1, and Q2_K, Q4_K and Q5_K, where

    scale = d * k,  base = -dmin * m   with integers k, m of a sub-block and float16 d, dmin of the super-block.

What is minimized is ``sum importance * (w - w')^2``. For given codes that is a quadratic in scale and base, known from
three sums (:class:`Moments`); for given scale and base the best codes are the nearest ones. Trials that start from
several ranges alternate between the two, and the best of each sub-block is taken. In a super-block its scale and base
are then rounded to what can be stored, and the integers around the optimum are tried with codes of their own.

Tensors are float32 [elements, sub-blocks, blocks] (weights, codes) and [sub-blocks, blocks] (per sub-block); a leading
dimension of trials may precede.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qconv.grids.ggml.numeric import as_half, inverse_determinant, reciprocal
from qconv.grids.ggml.superblock import nearest_integers, shared_scale
from qconv.grids.ggml.trials import best_trial, pick, survivors

_ANCHORS = (0.0, 0.5, 1.0)
"""What stays fixed of a range that is shortened or lengthened: its low end, middle or high end."""


@dataclass(frozen=True, slots=True)
class AffineGrid:
    """What a type can hold, and where its search begins.

    Attributes:
        levels: The largest code.
        top: The largest integer scale and min of a super-block; None where a block has a float16 scale and base.
        spans: A sub-block's range is tried as ``levels`` + each of these steps. The most useful stand first; the second
            half is tried only where importance differs, which makes more of the weights expendable.
    """

    levels: int
    top: int | None
    spans: tuple[float, ...]

    def starts(self, weighted: bool) -> list[tuple[float, float]]:
        """What a sub-block's range is divided by for each trial's scale, and at how many of those its base stands."""
        spans = self.spans if weighted else self.spans[: len(self.spans) // 2]
        return [(self.levels + span, span * anchor) for span in spans for anchor in _ANCHORS]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Codes, and what they are multiplied by and added to.

    Attributes:
        codes: float32 [elements, sub-blocks, blocks].
        scales: float32 [sub-blocks, blocks]: the integers k of a super-block, or a block's float16 scale.
        bases: The same: the integers m, or a block's float16 base.
        d: float32 [blocks]: float16 numbers; 1 without super-blocks.
        dmin: The same.
    """

    codes: Tensor
    scales: Tensor
    bases: Tensor
    d: Tensor
    dmin: Tensor


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over a sub-block's codes q, weights x and importance: all that a loss needs to know of the codes."""

    q: Tensor
    qq: Tensor
    xq: Tensor

    def pick(self, best: Tensor) -> Moments:
        """Of each sub-block the moments of one trial."""
        return Moments(pick(self.q, best), pick(self.qq, best), pick(self.xq, best))


class Source:
    """Weights to approximate, with the sums that no trial changes.

    They are shifted so that each sub-block begins at 0: squares of far-off values would drown the differences. Every
    ``base`` in here is shifted alike.
    """

    def __init__(self, weights: Tensor, importance: Tensor | None, grid: AffineGrid) -> None:
        low, high = weights.amin(0), weights.amax(0)
        if grid.top is not None:  # a super-block subtracts its mins: no base can be positive
            low, high = low.clamp_(max=0.0), high.clamp_(min=0.0)
        self.grid = grid
        self.low = low
        self.range = high - low
        self.weights = weights.sub_(low)
        self.importance = importance
        self.total = torch.full_like(low, len(weights)) if importance is None else importance.sum(0)
        self.x = self.weights.sum(0) if importance is None else (self.weights * importance).sum(0)

    def codes(self, scale: Tensor, base: Tensor) -> Tensor:
        """The nearest codes for a scale and base."""
        inverse = reciprocal(scale)
        # Not addcmul, which rounds once or twice depending on where in a tile a weight stands.
        return (self.weights * inverse).sub_(base * inverse).round_().clamp_(0.0, self.grid.levels)

    def moments(self, scales: Tensor, bases: Tensor) -> Moments:
        """Of the nearest codes for each trial's scale and base [trials, sub-blocks, blocks]."""
        found = Moments(torch.empty_like(scales), torch.empty_like(scales), torch.empty_like(scales))
        for trial, (scale, base) in enumerate(zip(scales, bases, strict=True)):
            codes = self.codes(scale, base)
            weighted = codes if self.importance is None else codes * self.importance
            torch.sum(weighted, 0, out=found.q[trial])
            torch.sum(weighted * self.weights, 0, out=found.xq[trial])
            torch.sum(weighted.mul_(codes), 0, out=found.qq[trial])
        return found

    def fit(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """The scale and base of the least squared error for given codes (weighted linear regression)."""
        inverse = inverse_determinant(self.total * moments.qq, moments.q * moments.q)
        scale = (self.total * moments.xq - moments.q * self.x) * inverse
        base = self.base(moments, scale)
        # Where the base met its bound, or the codes are all alike, the scale is what remains to be chosen.
        return (moments.xq - base * moments.q) * reciprocal(moments.qq), base

    def base(self, moments: Moments, scale: Tensor) -> Tensor:
        """The best base for given codes and scale."""
        base = (self.x - scale * moments.q) / self.total
        return base if self.grid.top is None else torch.minimum(base, -self.low)

    def gain(self, moments: Moments, scale: Tensor, base: Tensor) -> Tensor:
        """By how much the squared error falls below that of zeros: the more the better."""
        of_scale = scale * (2.0 * moments.xq - scale * moments.qq - 2.0 * base * moments.q)
        return of_scale + base * (2.0 * self.x - base * self.total)


def encode(weights: Tensor, importance: Tensor | None, grid: AffineGrid) -> Encoded:
    """Search codes, scales and bases.

    Args:
        weights: float32 [elements, sub-blocks, blocks]; overwritten.
        importance: The same shape, positive, or None.
        grid: What the type can hold.
    """
    source = Source(weights, importance, grid)
    scale, base, moments = best_of_ranges(source)
    if grid.top is not None:
        return _superblock(source, scale, moments, grid.top)
    scale, base = as_half(scale), as_half(base + source.low)
    one = torch.ones_like(scale[0])
    return Encoded(source.codes(scale, base - source.low), scale, base, one, one)


def best_of_ranges(source: Source) -> tuple[Tensor, Tensor, Moments]:
    """Of each sub-block the best real scale and base that the trials find, and the moments of their codes."""
    starts = source.grid.starts(weighted=source.importance is not None)
    scale = torch.stack([source.range / divisor for divisor, _ in starts])
    base = scale * torch.tensor([steps for _, steps in starts], device=scale.device).view(-1, 1, 1)
    moments = source.moments(scale, base)
    scale, base = source.fit(moments)
    scale, base = survivors(source.gain(moments, scale, base), len(_ANCHORS), scale, base)
    moments = source.moments(scale, base)
    scale, base = source.fit(moments)
    best = best_trial(source.gain(moments, scale, base))
    return pick(scale, best), pick(base, best), moments.pick(best)


def _superblock(source: Source, scale: Tensor, moments: Moments, top: int) -> Encoded:
    d = shared_scale(scale, moments.qq, 0, top)
    k = nearest_integers(scale, d, 0, top)
    dmin = shared_scale(-source.low - source.base(moments, d * k), source.total, 0, top)
    # The integers next to the wanted ones are tried too, each with codes of its own and the m that suits it.
    ks = torch.stack([k, (k - 1.0).clamp_(min=0.0), (k + 1.0).clamp_(max=top)])
    ms = nearest_integers(-source.low - source.base(moments, d * ks), dmin, 0, top)
    scales, bases = d * ks, -dmin * ms - source.low
    tried = source.moments(scales, bases)
    best = best_trial(source.gain(tried, scales, bases))
    k, m, moments = pick(ks, best), pick(ms, best), tried.pick(best)
    d, dmin = _refit(source, moments, k, m, d, dmin)
    return Encoded(source.codes(d * k, -dmin * m - source.low), k, m, d, dmin)


def _refit(source: Source, moments: Moments, k: Tensor, m: Tensor, d: Tensor, dmin: Tensor) -> tuple[Tensor, Tensor]:
    """The least-squares ``d`` and ``dmin`` for given integers and codes, where their float16 is an improvement.

    Solved for the corrections to both, whose right-hand sides are sums of small residuals.
    """
    scale, base = d * k, -dmin * m - source.low
    slope_d = (k * (moments.xq - scale * moments.qq - base * moments.q)).sum(0)
    slope_dmin = -(m * (source.x - scale * moments.q - base * source.total)).sum(0)
    dd, mm = (k * k * moments.qq).sum(0), (m * m * source.total).sum(0)
    dm = -(k * m * moments.q).sum(0)
    shared = dm * reciprocal(dd)
    new_dmin = dmin + (slope_dmin - shared * slope_d) * inverse_determinant(mm, shared * dm)
    new_dmin = as_half(new_dmin.clamp_(min=0.0) + 0.0)  # clamping may leave -0
    by_dmin = new_dmin - dmin
    new_d = d + (slope_d - dm * by_dmin) * reciprocal(dd)  # given the dmin that is stored
    new_d = as_half(new_d.clamp_(min=0.0) + 0.0)
    by_d = new_d - d
    cost = by_d * by_d * dd + 2.0 * by_d * by_dmin * dm + by_dmin * by_dmin * mm
    better = 2.0 * (by_d * slope_d + by_dmin * slope_dmin) > cost
    return torch.where(better, new_d, d), torch.where(better, new_dmin, dmin)
