"""Scales that are odd multiples of a step, ``unit`` times the float16 that the sub-blocks of a super-block share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qconv.grids.ggml.numeric import HALF_TINY, as_half, reciprocal, sum_of_halves
from qconv.grids.ggml.scaled import Moments
from qconv.grids.ggml.trials import best_trial, pick


def shared_step(wanted: Tensor, curvature: Tensor, unit: float, ends: Sequence[float]) -> Tensor:
    """What the scales of a super-block are odd multiples of: float32 [blocks], ``unit`` times a float16.

    Several are tried, each moved to the least-squares optimum for its multiples; the best is taken.

    Args:
        wanted: The sub-blocks' own scales, not negative, float32 [sub-blocks, blocks].
        curvature: What a squared error of each costs, float32 of the same shape, not negative.
        unit: See above.
        ends: What the largest scale is tried to become, in steps; the first is the largest multiple there is.
    """
    largest, most = wanted.amax(0), ends[0]
    trials = torch.stack([_storable(largest / end, unit) for end in ends]).unsqueeze(1)  # [ends, 1, blocks]
    multiples = nearest_multiples(wanted, trials, most)
    weighted = multiples * curvature
    optimum = sum_of_halves(weighted * wanted, 1) * reciprocal(sum_of_halves(weighted * multiples, 1))
    trials = _storable(optimum, unit).unsqueeze(1)
    missing = nearest_multiples(wanted, trials, most).mul_(trials).sub_(wanted)
    return pick(trials.squeeze(1), best_trial(-sum_of_halves(missing.square_().mul_(curvature), 1)))


def nearest_multiples(wanted: Tensor, step: Tensor, largest: float) -> Tensor:
    """The odd multiples of the step that are nearest, up to the largest: float32."""
    halves = (wanted * reciprocal(step)).sub_(1.0).div_(2.0)
    return halves.round_().clamp_(0.0, (largest - 1) / 2).mul_(2.0).add_(1.0)


def best_multiples(
    wanted: Tensor, step: Tensor, largest: float, moments_at: Callable[[Tensor], Moments]
) -> tuple[Tensor, Moments]:
    """Of the odd multiples around the wanted ones those whose points fit best: float32 [sub-blocks, blocks].

    Args:
        wanted: The sub-blocks' own scales, float32 [sub-blocks, blocks].
        step: What is multiplied, float32 [blocks].
        largest: The largest multiple there is.
        moments_at: Those of the points for each trial's scale, float32 [trials, sub-blocks * blocks].
    """
    nearest = nearest_multiples(wanted, step, largest)
    tried = torch.stack([nearest, (nearest - 2.0).clamp_(min=1.0), (nearest + 2.0).clamp_(max=largest)])
    scales = (tried * step).flatten(1)
    moments = moments_at(scales)
    best = best_trial(moments.gain(scales))
    chosen, shape = moments.pick(best), wanted.shape
    return pick(tried.flatten(1), best).view(shape), Moments(chosen.qq.view(shape), chosen.xq.view(shape))


def refit(multiples: Tensor, moments: Moments, step: Tensor, unit: float) -> Tensor:
    """The least-squares step for given multiples and points, where it is an improvement after rounding."""
    qq, xq = multiples * multiples * moments.qq, multiples * moments.xq
    sums = Moments(sum_of_halves(qq), sum_of_halves(xq))
    optimum = as_half(sums.optimum().clamp_(min=0.0) / unit + 0.0) * unit  # clamping may leave -0
    return torch.where(sums.gain(optimum) > sums.gain(step), optimum, step)


def _storable(step: Tensor, unit: float) -> Tensor:
    """As a float16 times the unit, and not 0 unless it is."""
    rounded = as_half(step / unit)
    return torch.where((rounded == 0.0) & (step > 0.0), HALF_TINY, rounded) * unit
