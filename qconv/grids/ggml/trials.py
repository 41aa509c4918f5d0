"""Choosing, for every sub-block on its own, among trials that stand in a tensor's first dimension."""

from __future__ import annotations

from torch import Tensor


def best_trial(gain: Tensor) -> Tensor:
    """The index of the trial that gains most: float32 [trials, ...] -> int64 [...]."""
    return gain.max(0).indices  # several times faster than argmax along the first dimension


def pick(trials: Tensor, best: Tensor) -> Tensor:
    """The chosen trial of each: [trials, ...] and int64 [...] -> [...]."""
    return trials.gather(0, best.unsqueeze(0)).squeeze(0)


def survivors(gain: Tensor, count: int, *trials: Tensor) -> list[Tensor]:
    """The best of every ``count``-th trial, beginning at each of the first ``count``: [trials, ...] -> [count, ...]."""
    rows = (-1, count, *gain.shape[1:])
    best = best_trial(gain.view(rows))
    return [pick(each.view(rows), best) for each in trials]
