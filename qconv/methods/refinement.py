"""What can still be gained after compensation: codes one by one, and scales again for given codes.

A sweep goes through the columns and gives each the code that is best given all others (coordinate descent in the norm
of H): it can only lower the loss. A refit chooses the scales of a run of columns anew by least squares for its codes,
where what can be stored lowers the loss, and then those columns' codes again.

Matrices are float32 and transposed, [in_features, out_features].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qconv.core.grid import Fit, Surroundings

_INNER = 32
"""Columns between two products with the whole span; a multiple of every grid's width."""


def refine_(weight: Tensor, values: Tensor, fit: Fit[Any], hessian: Tensor, sweeps: int, refits: int) -> None:
    """Descend from a rounding to a better one, in place.

    Args:
        weight: float32 [in_features, out_features], what is approximated.
        values: The same shape, what ``fit`` rounded it to.
        fit: Its scales; refits change them.
        hessian: float32 [in_features, in_features], damped; not changed.
        sweeps: Passes over the codes.
        refits: How many of them, from the first on, choose scales too.
    """
    columns = len(weight)
    error = weight - values
    for sweep in range(max(sweeps, refits)):
        for first in range(0, columns, fit.span):
            stop = min(first + fit.span, columns)
            rows = hessian[first:stop]
            around = Surroundings(rows[:, first:stop].contiguous(), values[first:stop], rows @ error)
            _sweep(fit, first, around)
            if sweep < refits:
                fit.refit_(first, around)
                _sweep(fit, first, around)
            torch.sub(weight[first:stop], around.values, out=error[first:stop])


def _sweep(fit: Fit[Any], first: int, around: Surroundings) -> None:
    """Once over the codes of a span."""
    columns, width = len(around.values), fit.width
    for start in range(0, columns, _INNER):
        stop = min(start + _INNER, columns)
        hessian = around.hessian[start:stop, start:stop]
        gradient = around.gradient[start:stop].clone()
        values = around.values[start:stop].clone()
        for column in range(0, stop - start, width):
            last = column + width
            own = hessian[column:last, column:last]
            slope, old = gradient[column:last], values[column:last]
            new = fit.round_(first + start + column, _optimum(own, slope).add_(old), own.diagonal())
            change = new - old
            if width > 1:
                gain = (change * (2.0 * slope - own @ change)).sum(0)
                change = torch.where(gain > 0.0, change, 0.0)
            old.add_(change)
            if last < len(values):
                gradient[last:].addmm_(hessian[last:, column:last], change, alpha=-1.0)
        around.move(start, stop, values.sub_(around.values[start:stop]))


def _optimum(hessian: Tensor, slope: Tensor) -> Tensor:
    """The change of columns that would lower the loss most, [columns, out_features]."""
    if len(hessian) == 1:
        return slope / hessian
    found: Tensor = torch.linalg.solve(hessian, slope)
    return found
