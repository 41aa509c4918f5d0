"""GPTQ on any grid: scales are fixed, then columns are rounded one after the other, each taking up earlier errors.

The loss of an output row with weight error d is ``d H d^T``. With the factor of :mod:`qconv.methods.gptq` it is a sum
over columns, and each is best rounded from its weight plus its share of the errors before it. A grid that rounds
several columns together (a lattice) gets them at once: given the errors before, they would best be rounded from what
:func:`_together` gives, and the block's own part of the factor says what an error of each then costs.

Matrices are float32 and transposed, [in_features, out_features].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qconv.core.grid import Fit, Run
from qconv.core.hessian import Factor
from qconv.core.settings import GptqSettings


def by_gptq(
    weight: Tensor, fit: Fit[Any], hessian: Tensor, factor: Callable[[int], Factor], settings: GptqSettings
) -> Tensor:
    """See :class:`qconv.core.method.Rounding`."""
    return compensate_(weight, fit, factor(fit.width), settings.block_size)


def compensate_(weight: Tensor, fit: Fit[Any], factor: Factor, block_size: int = 128) -> Tensor:
    """Round a weight on fixed scales, in place; returns it.

    Args:
        weight: float32 [in_features, out_features].
        fit: Its scales.
        factor: Of the inputs' second moments, in an order that keeps runs of ``fit.width`` columns together.
        block_size: Columns after which the errors are handed on to all the others at once.
    """
    order, width = factor.order, fit.width
    target = weight.index_select(0, order)
    block = max(width, block_size // width * width)
    for start in range(0, len(order), block):
        stop = min(start + block, len(order))
        columns, own = order[start:stop], factor.upper[start:stop, start:stop]
        run = Run(columns.tolist(), target[start:stop], weight.index_select(0, columns), own, factor.costs[start:stop])
        values = fit.round_(run if width == 1 else _together(run, width))
        weight.index_copy_(0, columns, values)
        share = factor.upper[start:stop, stop:]
        target[stop:].addmm_(share.t(), torch.sub(run.original, values, out=values))
    return weight


def _together(run: Run, width: int) -> Run:
    """What columns would be rounded from if those together with them made no error with regard to each other.

    Given the errors z that they are to make up for, and U, their part of the factor, ``z = U^T d`` is solved for the d
    that they would best have; an error of one besides costs the diagonal of ``U costs U^T``.
    """
    groups = len(run.columns) // width
    upper = torch.stack([run.shares[at : at + width, at : at + width] for at in range(0, len(run.columns), width)])
    unit = torch.eye(width, device=upper.device)
    inverse: Tensor = torch.linalg.solve_triangular(upper, unit, upper=True, unitriangular=True)
    taken = (run.targets - run.original).view(groups, width, -1)
    targets = torch.bmm(inverse.transpose(1, 2), taken).view_as(run.targets).add_(run.original)
    shares = torch.einsum("igw,gwv->igv", run.shares.reshape(-1, groups, width), inverse).reshape(run.shares.shape)
    metric = (upper.square() * run.metric.view(groups, 1, width)).sum(2).flatten()
    return Run(run.columns, targets, run.original, shares, metric)
