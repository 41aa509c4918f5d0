"""Statistics against scipy's, and against definitions worked out by brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from qconv.evaluation.statistics import (
    bca_ends,
    bootstrap_ratios,
    detectable_flips,
    detectable_mean,
    holm,
    incomplete_beta,
    mcnemar_p,
    percentile_ends,
    ratio_interval,
    ratio_standard_error,
    student_t_quantile,
    student_t_tail,
    upper_tail,
    wilson,
)

Floats = NDArray[np.float64]


@pytest.fixture
def documents() -> tuple[Floats, Floats]:
    """Skewed sums of 40 documents of very different lengths."""
    generator = np.random.default_rng(3)
    tokens = generator.integers(64, 512, 40).astype(np.float64)
    return generator.gamma(1.5, 0.002, 40) * tokens, tokens


def ratio(y: Floats, x: Floats, axis: int = -1) -> Floats:
    return np.asarray(y.sum(axis=axis) / x.sum(axis=axis))


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_ends_are_scipys_on_the_same_resamples(method: str, documents: tuple[Floats, Floats]) -> None:
    y, x = documents
    result = stats.bootstrap((y, x), ratio, paired=True, n_resamples=2000, method=method, rng=np.random.default_rng(0))
    resampled = np.asarray(result.bootstrap_distribution)
    left_out = (y.sum() - y) / (x.sum() - x)
    value = float(ratio(y, x))
    ends = bca_ends(resampled, value, left_out, 0.95) if method == "bca" else percentile_ends(resampled, 0.95)
    assert ends == pytest.approx(tuple(result.confidence_interval), rel=1e-9)


def test_intervals_are_scipys_up_to_the_draws(documents: tuple[Floats, Floats]) -> None:
    y, x = documents
    ours = ratio_interval(y, x)
    theirs = stats.bootstrap((y, x), ratio, paired=True, n_resamples=10_000, rng=np.random.default_rng(1))
    width = ours.high - ours.low
    # Ten thousand draws leave about a hundredth of the width; five of those.
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.05 * width)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.05 * width)
    assert ours.value == pytest.approx(float(ratio(y, x)))


def test_paired_differences_are_scipys(documents: tuple[Floats, Floats]) -> None:
    y, x = documents
    other = y * np.random.default_rng(5).normal(1.1, 0.05, len(y))

    def difference(a: Floats, b: Floats, c: Floats, axis: int = -1) -> Floats:
        return ratio(a, c, axis) - ratio(b, c, axis)

    ours = ratio_interval(other - y, x)
    theirs = stats.bootstrap((other, y, x), difference, paired=True, n_resamples=10_000, rng=np.random.default_rng(1))
    width = ours.high - ours.low
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.05 * width)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.05 * width)
    # Paired, the interval is far narrower than either build's own.
    assert width < 0.5 * (ratio_interval(y, x).high - ratio_interval(y, x).low)


def test_draws_are_a_function_of_the_seed_and_pair_runs(documents: tuple[Floats, Floats]) -> None:
    y, x = documents
    one = bootstrap_ratios(y, x, draws=300, seed=1)
    np.testing.assert_array_equal(one, bootstrap_ratios(y, x, draws=300, seed=1))
    assert not np.array_equal(one, bootstrap_ratios(y, x, draws=300, seed=2))
    columns = bootstrap_ratios(np.stack([y, 3 * y], axis=1), x, draws=300, seed=1)
    np.testing.assert_allclose(columns[:, 0], one, rtol=1e-12)
    np.testing.assert_allclose(columns[:, 1], 3 * one, rtol=1e-12)


def test_many_units_are_drawn_in_blocks() -> None:
    y = np.random.default_rng(0).random(30_000)
    resampled = bootstrap_ratios(y, np.ones_like(y), draws=300)
    assert resampled.shape == (300,)
    assert resampled.std() == pytest.approx(y.std() / math.sqrt(len(y)), rel=0.2)


def test_a_transform_carries_over_to_the_interval(documents: tuple[Floats, Floats]) -> None:
    y, x = documents
    plain, exponential = ratio_interval(y, x, method="percentile"), ratio_interval(y, x, transform=np.exp)
    assert exponential.value == pytest.approx(math.exp(plain.value))
    assert exponential.low < exponential.value < exponential.high


def test_identical_units_have_no_spread_and_one_unit_no_interval() -> None:
    same = ratio_interval(np.full(12, 6.0), np.full(12, 3.0))
    assert (same.value, same.low, same.high) == (2.0, 2.0, 2.0)
    one = ratio_interval(np.array([6.0]), np.array([3.0]))
    assert (one.value, one.low, one.high) == (2.0, -math.inf, math.inf)


def test_the_linearized_standard_error_is_the_resamples(documents: tuple[Floats, Floats]) -> None:
    y, x = documents
    assert ratio_standard_error(y, x) == pytest.approx(bootstrap_ratios(y, x).std(), rel=0.05)
    # With equal denominators it is the ordinary standard error of a mean.
    assert ratio_standard_error(y, np.ones_like(y)) == pytest.approx(float(stats.sem(y)))


@pytest.mark.parametrize("degrees", [1, 2, 5, 33, 400, 20_000])
@pytest.mark.parametrize("t", [-4.0, -0.3, 0.0, 0.7, 3.1, 9.0])
def test_students_tail_is_scipys(t: float, degrees: int) -> None:
    assert student_t_tail(t, degrees) == pytest.approx(float(stats.t.sf(t, degrees)), rel=1e-9)


@pytest.mark.parametrize("tail", [0.2, 1e-3, 1e-6])
def test_students_quantile_is_scipys(tail: float) -> None:
    assert student_t_quantile(tail, 17) == pytest.approx(float(stats.t.isf(tail, 17)), rel=1e-9)


@given(st.floats(0.001, 0.999), st.floats(0.5, 300.0), st.floats(0.5, 300.0))
def test_incomplete_beta_is_scipys(x: float, a: float, b: float) -> None:
    assert incomplete_beta(x, a, b) == pytest.approx(float(stats.beta.cdf(x, a, b)), rel=1e-8, abs=1e-290)


def test_the_tail_of_a_mean_is_a_t_test(documents: tuple[Floats, Floats]) -> None:
    y = documents[0] - 0.5
    ours = upper_tail(float(y.mean()), ratio_standard_error(y, np.ones_like(y)), len(y))
    assert ours == pytest.approx(float(stats.ttest_1samp(y, 0.0, alternative="greater").pvalue), rel=1e-9)
    assert upper_tail(0.1, 0.0, 5) == 0.0
    assert upper_tail(-0.1, 0.0, 5) == upper_tail(0.0, 0.0, 5) == upper_tail(9.0, math.inf, 1) == 1.0


@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_is_scipys_exact_binomial(lost: int, gained: int) -> None:
    expected = float(stats.binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0
    assert mcnemar_p(lost, gained) == pytest.approx(expected, rel=1e-9)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.9, 0.95]))
def test_wilson_is_scipys(case: tuple[int, int], confidence: float) -> None:
    successes, trials = case
    ours = wilson(successes, trials, confidence)
    theirs = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert (ours.low == 0.0) == (successes == 0)
    assert (ours.high == 1.0) == (successes == trials)


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferroni(p_values: list[float]) -> None:
    """A hypothesis is rejected if every set of hypotheses with it is rejected by Bonferroni (Marcus et al. 1976)."""
    everything = range(len(p_values))
    for index, adjusted in enumerate(holm(p_values)):
        sets = [
            chosen
            for size in range(1, len(p_values) + 1)
            for chosen in itertools.combinations(everything, size)
            if index in chosen
        ]
        expected = max(min(1.0, len(chosen) * min(p_values[one] for one in chosen)) for chosen in sets)
        assert adjusted == pytest.approx(expected)


def test_a_change_of_the_detectable_size_is_found_as_often_as_promised() -> None:
    generator, units, alpha = np.random.default_rng(0), 30, 0.01
    excess = detectable_mean(1.0 / math.sqrt(units), units, alpha)
    samples = generator.normal(excess, 1.0, (4000, units))
    found = stats.ttest_1samp(samples, 0.0, axis=1, alternative="greater").pvalue < alpha
    # The sum of two quantiles stands for a noncentral t; it is a little off with few units.
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("gained", [0, 3])
def test_the_detectable_drop_is_the_least_significant_one(gained: int) -> None:
    drop = detectable_flips(164, gained, 0.001)
    lost = round(drop * 164) + gained
    assert mcnemar_p(lost, gained) < 0.001 <= mcnemar_p(lost - 1, gained)
    assert detectable_flips(8, 0, 0.001) == math.inf  # 2 / 2**8 is 0.008
