"""pass@k."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from math import comb


def pass_at_k(samples: int, passed: int, k: int) -> Fraction:
    """The chance that one of ``k`` samples passes, estimated without bias from ``samples``, of which ``passed`` did.

    1 - C(n - c, k) / C(n, k): Chen et al. 2021, equation 1; exact.

    Raises:
        ValueError: fewer samples than k, or counts that are none.
    """
    if not 0 <= passed <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples, {passed} of which passed")
    return 1 - Fraction(comb(samples - passed, k), comb(samples, k))


def mean_pass_at_k(counts: Iterable[tuple[int, int]], k: int) -> float | None:
    """The mean over problems, given (samples, passed) of each; None over no problem."""
    estimates = [pass_at_k(samples, passed, k) for samples, passed in counts]
    return float(sum(estimates, Fraction(0)) / len(estimates)) if estimates else None
