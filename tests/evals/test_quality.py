"""The quality script's own arithmetic: what is held out, what is measured, how sure it is."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from evals.options import TINY
from evals.quality import CALIBRATION, WINDOW, Measured, compare, difference, held_out_text, log_probabilities
from qconv.calibration.corpus import build_tokens


class Fixed:
    """A model that gives the same distribution over three tokens everywhere."""

    def __init__(self, *probabilities: float) -> None:
        self.logits = torch.tensor(probabilities).log()

    def __call__(self, ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*ids.shape, 3))


def measured(kl: list[float], tokens: list[float]) -> Measured:
    zeros = np.zeros(len(kl))
    return Measured(np.array(tokens), np.array(kl), zeros, zeros)


def test_held_out_text_shares_no_window_with_calibration() -> None:
    held_out = held_out_text(TINY, 4096)
    assert 4096 <= sum(ids.shape[1] for ids in held_out) < 4096 + WINDOW
    calibration = build_tokens(CALIBRATION, TINY).ids.flatten().tolist()
    # A run of 40 tokens is far longer than what unrelated files have in common at their starts.
    seen = {tuple(calibration[at : at + 40]) for at in range(len(calibration))}
    assert not [ids for ids in held_out if tuple(ids[0, :40].tolist()) in seen]


def test_divergence_likelihood_and_agreement_of_known_distributions() -> None:
    p, q = Fixed(0.5, 0.25, 0.25), Fixed(0.25, 0.5, 0.25)
    held_out = [torch.tensor([[0, 1, 2]]), torch.tensor([[1, 1]])]
    source, other = log_probabilities(p, held_out), log_probabilities(q, held_out)
    result = compare(source, other, held_out)
    assert result.tokens.tolist() == [2, 1]  # predictions: one fewer than tokens
    # By hand: 0.5 log(0.5 / 0.25) + 0.25 log(0.25 / 0.5) + 0
    assert result.kl.tolist() == pytest.approx([2 * 0.25 * math.log(2), 0.25 * math.log(2)])
    assert result.nll.tolist() == pytest.approx([math.log(2) + math.log(4), math.log(2)])
    assert result.agree.tolist() == [0, 0]
    assert compare(source, source, held_out).kl.tolist() == pytest.approx([0, 0])


def test_standard_error_of_equal_documents_is_the_ordinary_one() -> None:
    result = measured([1.0, 2.0, 4.0, 7.0], [10.0] * 4)
    means = np.array([0.1, 0.2, 0.4, 0.7])
    assert result.mean(result.kl) == pytest.approx(means.mean())
    assert result.standard_error(result.kl) == pytest.approx(means.std(ddof=1) / 2)


def test_pairing_finds_a_difference_that_is_small_beside_the_spread_of_documents() -> None:
    spread = list(np.linspace(1.0, 100.0, 40))
    builds = {"better": measured([kl - 0.5 for kl in spread], [10.0] * 40), "worse": measured(spread, [10.0] * 40)}
    gap = difference(("better", "worse"), builds)
    assert gap.kl == pytest.approx(-0.05)
    assert gap.low <= gap.kl <= gap.high < 0


def test_no_difference_is_not_called_one() -> None:
    noise = np.random.default_rng(1).normal(size=40)
    builds = {"a": measured(list(10 + noise), [10.0] * 40), "b": measured(list(10 + noise[::-1]), [10.0] * 40)}
    gap = difference(("a", "b"), builds)
    assert gap.low < 0 < gap.high
