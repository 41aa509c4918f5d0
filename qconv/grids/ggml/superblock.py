"""The one float16 scale that the integer scales of a super-block's sub-blocks share."""

from __future__ import annotations

import torch
from torch import Tensor

from qconv.grids.ggml.numeric import HALF_TINY, as_half, reciprocal
from qconv.grids.ggml.trials import best_trial, pick


def shared_scale(wanted: Tensor, curvature: Tensor, lowest: int, highest: int) -> Tensor:
    """A float16 ``d`` for which ``sum curvature * (wanted - d * k)^2`` is small, k being the nearest integers in range.

    It starts where the largest wanted scale gets the highest integer, or the lowest, and moves to its least-squares
    optimum.

    Args:
        wanted: The sub-blocks' own scales, float32 [sub-blocks, blocks].
        curvature: What a squared error of each costs, float32 of the same shape, not negative.
        lowest: The lowest integer; if it is 0, no wanted scale is negative.
        highest: The highest integer.

    Returns:
        float32 [blocks], float16 numbers; 0 only where every wanted scale is.
    """
    magnitude, place = wanted.abs().max(0)
    extreme = pick(wanted, place) if lowest else magnitude
    ends = [highest, lowest] if lowest else [highest]
    trial = torch.stack([_storable(extreme / end) for end in ends]).unsqueeze(1)  # [ends, 1, blocks]
    integers = nearest_integers(wanted, trial, lowest, highest)
    weighted = integers * curvature
    optimum = (weighted * wanted).sum(1, keepdim=True) * reciprocal((weighted * integers).sum(1, keepdim=True))
    trial = torch.where(optimum == 0.0, trial, _storable(optimum))
    missing = nearest_integers(wanted, trial, lowest, highest).mul_(trial).sub_(wanted)
    return pick(trial.squeeze(1), best_trial(-missing.square_().mul_(curvature).sum(1)))


def nearest_integers(wanted: Tensor, scale: Tensor, lowest: int, highest: int) -> Tensor:
    """``round(wanted / scale)`` within the range, float32; 0 where the scale is 0."""
    return (wanted * reciprocal(scale)).round_().clamp_(lowest, highest)


def _storable(scale: Tensor) -> Tensor:
    """As float16, and not 0 unless it is: small integers can still use the smallest float16 there is."""
    rounded = as_half(scale)
    return torch.where(rounded == 0.0, torch.sign(scale) * HALF_TINY, rounded)
