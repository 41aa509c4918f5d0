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

from qconv.core.grid import Fit, Run, Surroundings

_BLOCK = 128
"""Columns, at least, between two products with all of H."""
_INNER = 128
"""Columns between two products with a block's part of it; a multiple of every grid's width."""


def refine_(
    weight: Tensor, values: Tensor, fit: Fit[Any], hessian: Tensor, damp_percent: float, sweeps: int, refits: int
) -> None:
    """Descend from a rounding to a better one, in place.

    Args:
        weight: float32 [in_features, out_features], what is approximated.
        values: The same shape, what ``fit`` rounded it to.
        fit: Its scales; refits change them.
        hessian: float32 [in_features, in_features], the mean over tokens of ``x x^T``; not changed.
        damp_percent: What its diagonal is raised by, as a share of the mean diagonal.
        sweeps: Passes over the codes.
        refits: How many of them, from the first on, choose scales too.
    """
    mean = float(hessian.diagonal().mean(dtype=torch.float64)) or 1.0
    block = -(-_BLOCK // fit.span) * fit.span
    error = weight - values
    for sweep in range(max(sweeps, refits)):
        for first in range(0, len(weight), block):
            stop = min(first + block, len(weight))
            own = (hessian[first:stop, first:stop] / mean).contiguous()
            own.diagonal().add_(damp_percent)
            gradient = (hessian[first:stop] @ error).div_(mean).add_(error[first:stop], alpha=damp_percent)
            # Grids round on the host.
            around = Surroundings(first, own.cpu(), values[first:stop].cpu(), gradient.cpu())
            _sweep(fit, around)
            if sweep < refits:
                for span in range(first, stop, fit.span):
                    fit.refit_(span, around)
                _sweep(fit, around)
            if values.device.type != "cpu":
                values[first:stop] = around.values
            torch.sub(weight[first:stop], values[first:stop], out=error[first:stop])


def _sweep(fit: Fit[Any], around: Surroundings) -> None:
    """Once over the codes of a block."""
    columns, width = len(around.values), fit.width
    for start in range(0, columns, _INNER):
        stop = min(start + _INNER, columns)
        hessian, values = around.hessian[start:stop, start:stop], around.values[start:stop]
        targets, shares = _optima(hessian, around.gradient[start:stop], width)
        run = Run(
            range(around.first + start, around.first + stop),
            targets.add_(values),
            values,
            shares,
            hessian.diagonal(),
            hessian,
        )
        around.put(start, fit.round_(run))


def _optima(hessian: Tensor, gradient: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The changes that would lower the loss most if the other columns stayed, and what a change elsewhere adds to them.

    Args:
        hessian: [columns, columns].
        gradient: [columns, out_features].
        width: Columns that change together.

    Returns:
        [columns, out_features], and at i, j what the column j takes up of an i's value getting smaller: [columns,
        columns].
    """
    if width == 1:
        diagonal = hessian.diagonal()
        return gradient / diagonal.unsqueeze(1), hessian / diagonal
    groups = len(hessian) // width
    own = torch.stack([hessian[at : at + width, at : at + width] for at in range(0, len(hessian), width)])
    optima: Tensor = torch.linalg.solve(own, gradient.view(groups, width, -1))
    shares: Tensor = torch.linalg.solve(own, hessian.view(groups, width, -1))
    return optima.reshape(gradient.shape), shares.reshape(hessian.shape).t()
