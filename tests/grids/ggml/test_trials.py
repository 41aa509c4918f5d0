"""Choosing among trials, each place on its own."""

from __future__ import annotations

import torch

from qconv.grids.ggml.trials import best_trial, pick, survivors


def test_each_place_takes_its_own_best() -> None:
    gain = torch.tensor([[1.0, 9.0], [5.0, 2.0], [3.0, 4.0]])
    best = best_trial(gain)
    assert best.tolist() == [1, 0]
    assert pick(gain * 10.0, best).tolist() == [50.0, 90.0]


def test_survivors_are_the_best_of_every_second() -> None:
    # Trials 0, 2, 4 compete for the first place, 1, 3, 5 for the second; beside them what they stand for.
    gain = torch.tensor([[1.0], [2.0], [7.0], [1.0], [3.0], [9.0]])
    names = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]])
    kept, gains = survivors(gain, 2, names, gain)
    assert kept.tolist() == [[2.0], [5.0]]
    assert gains.tolist() == [[7.0], [9.0]]
