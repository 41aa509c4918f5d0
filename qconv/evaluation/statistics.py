"""How sure a number is: bootstrap intervals over whole units, exact tests of flips, correction for many gates.

The unit of resampling is a document, a window of text or a problem, never a token: tokens of one text depend on each
other. A mean per token is then a ratio of two sums over units, ``sum(y) / sum(x)``, and both are resampled together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
POWER = 0.8
"""With which a change of the minimum detectable size is found."""

Floats: TypeAlias = NDArray[np.float64]
_NORMAL = NormalDist()
_BLOCK = 1 << 22
"""Numbers of one block of draws: 32 MB."""
_TERMS = 200
"""Of a continued fraction; about the root of its larger parameter is enough."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and the ends of its confidence interval."""

    value: float
    low: float
    high: float


def finite(value: float) -> float | None:
    """What a result says of a number: None where there is none."""
    return value if math.isfinite(value) else None


def draw_counts(units: int, draws: int, seed: int) -> Iterator[Floats]:
    """How often each unit is drawn in each resample of ``units`` units, in blocks of rows [resamples, units].

    The draws depend on the arguments alone: two runs on the same units are resampled alike, which is what pairs them.
    """
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK // max(1, units))
    for start in range(0, draws, rows):
        size = min(rows, draws - start)
        # Not NumPy's multinomial: over thousands of units its rounding piles up in the last one.
        drawn = generator.integers(units, size=(size, units)) + units * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * units).reshape(size, units).astype(np.float64)


def bootstrap_ratios(y: Floats, x: Floats, *, draws: int = DRAWS, seed: int = 0) -> Floats:
    """``sum(y) / sum(x)`` of resamples of the units.

    Args:
        y: [units], or [units, columns] for several numerators at once, paired.
        x: [units]; denominators such as tokens.
        draws: Resamples.
        seed: Of the draws.

    Returns:
        [draws] or [draws, columns]; NaN where a resample's denominator is zero.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        parts = [
            (counts @ y) / ((counts @ x) if y.ndim == 1 else (counts @ x)[:, None])
            for counts in draw_counts(len(x), draws, seed)
        ]
    return np.concatenate(parts)


def ratio_interval(
    y: Floats,
    x: Floats,
    *,
    confidence: float = 0.95,
    method: Literal["bca", "percentile"] = "bca",
    draws: int = DRAWS,
    seed: int = 0,
    transform: Callable[[Floats], Floats] = lambda ratio: ratio,
) -> Interval:
    """``transform(sum(y) / sum(x))`` with a bootstrap interval over the units.

    One unit has no interval: its ends are infinite.
    """
    value = float(transform(np.array([y.sum() / x.sum()]))[0])
    if len(x) < 2:
        return Interval(value, -math.inf, math.inf)
    resampled = transform(bootstrap_ratios(y, x, draws=draws, seed=seed))
    if method == "percentile":
        low, high = percentile_ends(resampled, confidence)
    else:
        left_out = transform((y.sum() - y) / (x.sum() - x))
        low, high = bca_ends(resampled, value, left_out, confidence)
    return Interval(value, low, high)


def percentile_ends(resampled: Floats, confidence: float) -> tuple[float, float]:
    """The plain bootstrap interval: quantiles of the resamples (Efron and Tibshirani 1993, section 13.3)."""
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(resampled, [tail, 1.0 - tail])
    return float(low), float(high)


def bca_ends(resampled: Floats, value: float, left_out: Floats, confidence: float) -> tuple[float, float]:
    """The bias-corrected and accelerated interval (Efron and Tibshirani 1993, section 14.3).

    Args:
        resampled: The statistic of the resamples.
        value: The statistic of the sample.
        left_out: The statistic of the sample without each unit in turn, for the acceleration.
        confidence: Such as 0.95.
    """
    if np.all(resampled == resampled[0]):
        return float(resampled[0]), float(resampled[0])
    below = (np.mean(resampled < value) + np.mean(resampled <= value)) / 2.0
    if not 0.0 < below < 1.0:
        return percentile_ends(resampled, confidence)
    bias = _NORMAL.inv_cdf(float(below))
    spread = left_out.mean() - left_out
    scale = float((spread**2).sum()) ** 1.5
    acceleration = float((spread**3).sum()) / (6.0 * scale) if scale > 0.0 else 0.0
    tail = (1.0 - confidence) / 2.0
    ends = []
    for quantile in (_NORMAL.inv_cdf(tail), _NORMAL.inv_cdf(1.0 - tail)):
        shifted = bias + quantile
        ends.append(_NORMAL.cdf(bias + shifted / (1.0 - acceleration * shifted)))
    low, high = np.quantile(resampled, ends)
    return float(low), float(high)


def ratio_standard_error(y: Floats, x: Floats) -> float:
    """Of ``sum(y) / sum(x)`` over units, linearized (Cochran 1977, section 6.3); infinite for one unit."""
    count = len(x)
    if count < 2:
        return math.inf
    residual = y - y.sum() / x.sum() * x
    return math.sqrt(count / (count - 1) * float(np.square(residual).sum())) / float(x.sum())


def upper_tail(value: float, standard_error: float, units: int) -> float:
    """One-sided p-value of a true mean of at most 0, by Student's t with ``units - 1`` degrees of freedom."""
    if standard_error == 0.0:
        return 0.0 if value > 0.0 else 1.0
    if not math.isfinite(standard_error):
        return 1.0
    return student_t_tail(value / standard_error, units - 1)


def student_t_tail(t: float, degrees: float) -> float:
    """P(T > t) of Student's distribution, by the incomplete beta function (Abramowitz and Stegun 26.5.27, 26.7.1)."""
    both = incomplete_beta(degrees / (degrees + t * t), degrees / 2.0, 0.5)
    return both / 2.0 if t >= 0.0 else 1.0 - both / 2.0


def student_t_quantile(tail: float, degrees: float) -> float:
    """The t that is exceeded with probability ``tail`` (below one half), by bisection."""
    low, high = 0.0, 1.0
    while student_t_tail(high, degrees) > tail:
        low, high = high, 2.0 * high
    while high - low > 1e-10 * high:
        middle = (low + high) / 2.0
        low, high = (middle, high) if student_t_tail(middle, degrees) > tail else (low, middle)
    return high


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function I_x(a, b), by its continued fraction (Abramowitz and Stegun 26.5.8)."""
    if x <= 0.0 or x >= 1.0:
        return min(1.0, max(0.0, x))
    if x > (a + 1.0) / (a + b + 2.0):  # beyond this the mirrored function's fraction converges faster
        return 1.0 - incomplete_beta(1.0 - x, b, a)
    fraction = 1.0
    for step in range(_TERMS, 0, -1):
        m = step // 2
        if step % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        fraction = 1.0 + term / fraction
    logarithm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(logarithm) / (a * fraction)


def mcnemar_p(lost: int, gained: int) -> float:
    """Two-sided exact p-value of McNemar's test: of ``lost + gained`` flips each goes either way with equal chance."""
    flips = lost + gained
    tail = sum(math.comb(flips, k) for k in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / (1 << flips))


def wilson(successes: float, trials: float, confidence: float = 0.95) -> Interval:
    """Wilson's interval of a proportion (Wilson 1927), which stays within [0, 1] and is right at its ends."""
    if trials <= 0:
        return Interval(math.nan, 0.0, 1.0)
    z = _NORMAL.inv_cdf(0.5 + confidence / 2.0)
    share = successes / trials
    scale = 1.0 + z * z / trials
    centre = (share + z * z / (2.0 * trials)) / scale
    half = z / scale * math.sqrt(share * (1.0 - share) / trials + z * z / (4.0 * trials**2))
    low = 0.0 if share == 0.0 else max(0.0, centre - half)  # at the ends the difference is rounding noise
    return Interval(share, low, 1.0 if share == 1.0 else min(1.0, centre + half))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979): rejecting those below alpha errs at all with a chance of at most alpha."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def detectable_mean(standard_error: float, units: int, alpha: float) -> float:
    """The true excess over a limit that a one-sided t-test at ``alpha`` finds with probability :data:`POWER`."""
    if units < 2 or not math.isfinite(standard_error):
        return math.inf
    degrees = units - 1
    return standard_error * (student_t_quantile(alpha, degrees) + student_t_quantile(1.0 - POWER, degrees))


def detectable_flips(problems: int, gained: int, alpha: float) -> float:
    """The least drop of pass@1, as a share of ``problems``, that McNemar's test at ``alpha`` calls significant.

    Beside ``gained`` problems that only the build solves. Infinite if even losing all others would not do.
    """
    for lost in range(gained + 1, problems - gained + 1):
        if mcnemar_p(lost, gained) < alpha:
            return (lost - gained) / problems
    return math.inf
