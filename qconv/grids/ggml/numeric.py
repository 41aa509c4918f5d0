"""Arithmetic that survives zeros and the narrow range of float16."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

HALF_MAX = 65504.0
"""The largest finite float16."""

HALF_TINY = 2.0**-24
"""The smallest positive float16."""

_SINGULAR = 1e-5


def as_half(values: Tensor) -> Tensor:
    """The nearest finite float16 numbers, as float32."""
    return values.clamp(-HALF_MAX, HALF_MAX).to(torch.float16).float()


def reciprocal(values: Tensor) -> Tensor:
    """1 / values, and 0 where that is not finite."""
    # Not by torch.where, which takes ten times as long as other operations on a processor.
    return values.reciprocal().nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def square_root(values: Tensor) -> Tensor:
    """The square roots, correctly rounded as C's sqrtf is: torch's may be the next float on some processors."""
    return values.double().sqrt_().float()


def inverse_determinant(product: Tensor, subtrahend: Tensor) -> Tensor:
    """1 / (product - subtrahend), and 0 where the difference is rounding noise of the product."""
    share = functional.threshold(1.0 - subtrahend * reciprocal(product), _SINGULAR, torch.inf)
    return reciprocal(share * product)


def sum_of_halves(terms: Tensor, dim: int = 0) -> Tensor:
    """The sum over a dimension whose size is a power of two, in an order that is the same on every processor."""
    while terms.shape[dim] > 1:
        first, second = terms.chunk(2, dim)
        terms = first + second
    return terms.squeeze(dim)
