"""Divergence token by token against float64, and bounds where only the most probable tokens are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import log_softmax, rel_entr

from qconv.evaluation.divergence import Reference, TokenScores, negative_log_likelihood, token_scores

N, VOCABULARY = 40, 300


def logits(seed: int, scale: float = 3.0) -> NDArray[np.float32]:
    return (scale * np.random.default_rng(seed).standard_normal((N, VOCABULARY))).astype(np.float32)


def targets(seed: int = 9) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(VOCABULARY, size=N).astype(np.int32)


def exact(p: NDArray[np.float32], q: NDArray[np.float32]) -> NDArray[np.float64]:
    """By scipy, in float64."""
    log_p, log_q = log_softmax(p.astype(np.float64), axis=1), log_softmax(q.astype(np.float64), axis=1)
    return np.asarray(rel_entr(np.exp(log_p), np.exp(log_q)).sum(axis=1))


def test_whole_distributions_give_the_exact_divergence() -> None:
    p, q = logits(0), logits(1)
    scores = token_scores(Reference.of(p, targets(), None), q, targets())
    np.testing.assert_allclose(scores.kl, exact(p, q), rtol=1e-5)
    assert scores.kl_high is None
    log_q = log_softmax(q.astype(np.float64), axis=1)
    np.testing.assert_allclose(scores.nll, -log_q[np.arange(N), targets()], rtol=1e-5)
    np.testing.assert_array_equal(scores.agree, p.argmax(1) == q.argmax(1))
    np.testing.assert_allclose(scores.confidence, np.exp(log_softmax(p.astype(np.float64), axis=1)).max(1), rtol=1e-5)


def test_small_divergences_keep_their_digits_in_float32() -> None:
    p = logits(0)
    q = p + 1e-3 * logits(1, scale=1.0)
    scores = token_scores(Reference.of(p, targets(), None), q, targets())
    # About 5e-7 each, no more than float32's normalization is off by.
    np.testing.assert_allclose(scores.kl, exact(p, q), rtol=0.02)


def test_a_model_does_not_diverge_from_itself() -> None:
    for top in (None, 20):
        scores = token_scores(Reference.of(logits(0), targets(), top), logits(0), targets())
        np.testing.assert_allclose(scores.kl, 0.0, atol=1e-9)
        assert scores.agree.all()
        np.testing.assert_array_equal(scores.nll, scores.reference_nll)


@given(st.integers(0, 10**6), st.integers(1, VOCABULARY), st.floats(0.1, 8.0), st.floats(0.01, 4.0))
def test_the_bounds_hold_the_truth(seed: int, top: int, scale: float, change: float) -> None:
    p = logits(seed, scale)
    q = p + logits(seed + 1, change)
    known = token_scores(Reference.of(p, targets(), top), q, targets())
    truth = exact(p, q)
    slack = 1e-4 * (1.0 + truth)  # of float32
    assert (known.kl <= truth + slack).all()
    if known.kl_high is None:
        assert top >= VOCABULARY
    else:
        assert (known.kl_high >= truth - slack).all()
    np.testing.assert_array_equal(known.agree, p.argmax(1) == q.argmax(1))
    np.testing.assert_allclose(known.nll, token_scores(Reference.of(p, targets(), None), q, targets()).nll)


def test_the_upper_bound_is_reached_by_the_worst_tail() -> None:
    """A reference whose tail lies as the bound supposes: on the build's least probable tokens, none above the kept."""
    top, worst = 5, 10
    q = logits(3)
    p = np.full((N, VOCABULARY), -60.0, dtype=np.float32)
    for row in range(N):
        order = q[row].argsort()
        p[row, order[:worst]] = 0.0  # the tail: as probable as the least of those kept
        p[row, order[-top:]] = [2.0, 1.5, 1.0, 0.5, 1e-3]  # and hardly less than these
    scores = token_scores(Reference.of(p, targets(), top), q, targets())
    assert scores.kl_high is not None
    truth = exact(p, q)
    np.testing.assert_allclose(scores.kl_high, truth, rtol=2e-3)
    assert (scores.kl < truth).all()


def test_keeping_more_tokens_brings_the_bounds_together() -> None:
    p, q = logits(0), logits(1)
    widths = []
    for top in (5, 50, 290):
        scores = token_scores(Reference.of(p, targets(), top), q, targets())
        assert scores.kl_high is not None
        widths.append(float((scores.kl_high - scores.kl).mean()))
    assert widths[0] > 3 * widths[1] > 9 * widths[2] > 0


def test_the_tails_mass_is_exact_where_it_is_thin() -> None:
    p = logits(0, scale=6.0)
    reference = Reference.of(p, targets(), 200)
    probabilities = np.sort(np.exp(log_softmax(p.astype(np.float64), axis=1)), axis=1)
    assert reference.tail is not None
    expected = probabilities[:, : VOCABULARY - 200].sum(1)
    assert expected.min() < 1e-6
    np.testing.assert_allclose(reference.tail, expected, rtol=1e-4)


@pytest.mark.parametrize("top", [None, 20])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_infinitely_wrong(bad: float, top: int | None) -> None:
    q = logits(0)
    q[3, 7] = bad
    scores = token_scores(Reference.of(logits(0), targets(), top), q, targets())
    assert scores.kl[3] == scores.nll[3] == np.inf
    assert not scores.agree[3]
    assert np.isfinite(np.delete(scores.kl, 3)).all()


def test_parts_join_to_the_whole() -> None:
    reference = Reference.of(logits(0), targets(), 20)
    whole = token_scores(reference, logits(1), targets())
    parts = [
        token_scores(reference.rows(start, stop), logits(1)[start:stop], targets()[start:stop])
        for start, stop in ((0, 15), (15, N))
    ]
    joined = TokenScores.joined([TokenScores.from_arrays(part.arrays()) for part in parts])
    for name, array in whole.arrays().items():
        np.testing.assert_array_equal(joined.arrays()[name], array)


def test_likelihood_alone_is_torchs() -> None:
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits(2)), torch.from_numpy(targets().astype(np.int64)), reduction="none"
    )
    np.testing.assert_allclose(negative_log_likelihood(logits(2), targets()), expected.numpy(), rtol=1e-6)
