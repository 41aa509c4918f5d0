"""GPTQ on any grid: scales are fixed, then columns are rounded one after the other, each taking up earlier errors.

The loss of an output row with weight error d is ``d H d^T``. With the factor of :mod:`qconv.methods.gptq` it is a sum
over columns, and each is best rounded from its weight plus its share of the errors before it. A grid that rounds
several columns together (a lattice) gets them at once: given the errors before, they would best be rounded from what
:func:`_expected` gives, whose errors with each other the block's own part of the factor weighs.

Matrices are float32 and transposed, [in_features, out_features].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qconv.core.grid import Fit
from qconv.methods.gptq import Factor


def compensate(weight: Tensor, fit: Fit[Any], factor: Factor, block_size: int = 128) -> Tensor:
    """Round a weight on fixed scales.

    Args:
        weight: float32 [in_features, out_features]; not changed.
        fit: Its scales.
        factor: Of the inputs' second moments, in an order that keeps runs of ``fit.width`` columns together.
        block_size: Columns after which the errors are handed on to all the others at once.

    Returns:
        The values, float32 [in_features, out_features].
    """
    order, width, upper = factor.order, fit.width, factor.upper
    original = weight.index_select(0, order)
    target = original.clone()
    errors = torch.empty_like(original)
    places = order.tolist()
    block = max(width, block_size // width * width)
    for start in range(0, len(places), block):
        stop = min(start + block, len(places))
        for first in range(start, stop, width):
            last = first + width
            if first > start:
                share = upper[start:first, first:last]
                target[first:last].addmm_(share.t(), errors[start:first])
            metric = factor.costs[first:last]
            wanted = target[first:last]
            if width > 1:
                own = upper[first:last, first:last]
                wanted = _expected(wanted, original[first:last], own)
                metric = (own.square() * metric).sum(1)
            values = fit.round_(places[first], wanted, metric)
            torch.sub(original[first:last], values, out=errors[first:last])
        if stop < len(places):
            target[stop:].addmm_(upper[start:stop, stop:].t(), errors[start:stop])
    return original.sub_(errors).index_select(0, torch.argsort(order))


def _expected(targets: Tensor, original: Tensor, upper: Tensor) -> Tensor:
    """What columns would be rounded from if none of them made an error with regard to the others.

    Targets hold the shares of the columns before them alone; ``(targets - original) = U^T d`` is solved for the d that
    they would best have.
    """
    found: Tensor = torch.linalg.solve_triangular(upper.t(), targets - original, upper=False, unitriangular=True)
    return found.add_(original)
