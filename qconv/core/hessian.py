"""Second moments of a linear's inputs: what an error of its weights costs, and the factor that spreads it over columns.

The loss of an output row with weight error d is ``d H d^T``, H the mean over tokens of ``x x^T``. With ``H = R R^T``, R
upper triangular, it is a sum over columns,

    ``sum_j R[j, j]^2 (d_j + sum_{i<j} d_i R[i, j] / R[j, j])^2``.

R is the inverse of GPTQ's factor (Frantar et al. 2022, https://arxiv.org/abs/2210.17323): the upper Cholesky factor U
of H^-1 has ``H^-1 = U^T U`` and gives ``U = R^-1``. This one needs one factorization where the paper's needs two and an
inversion, and works where H is barely invertible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qconv.core.settings import GptqSettings
from qconv.errors import QconvError

DAMPING_STEP = 10.0
"""Factor on the damping after each failed factorization."""
MAX_DAMPING = 1e4
"""A damping, as a share of the mean diagonal, far above what float32 makes of any second moments' rounding errors: a
matrix that fails with more is none."""
_PANEL = 512


@dataclass(frozen=True, slots=True)
class Factor:
    """A factored Hessian; linears that share their input share it.

    Attributes:
        order: int64 [in_features], the columns in the order of their rounding.
        upper: float32 [in_features, in_features], unit upper triangular, in that order: ``R[i, j] / R[j, j]``.
        costs: float32 [in_features], in that order: ``R[j, j]^2``, what a squared error of a column costs, up to one
            common factor.
        damp_percent: The damping that was used, as a share of the mean diagonal.
        escalations: How often it had to be raised.
        dead_columns: How many inputs were zero on every token.
    """

    order: Tensor
    upper: Tensor
    costs: Tensor
    damp_percent: float
    escalations: int
    dead_columns: int


def factorize(hessian: Tensor, settings: GptqSettings, together: int = 1) -> Factor:
    """The triangular factor of a damped Hessian, its columns in the order of their rounding.

    ``damp_percent`` of the mean diagonal is added to the diagonal, ten times more each time the factorization fails. An
    input that was zero on every token has a zero row and column; damping alone is left of it, so its weights are kept
    and rounded to nearest, neither taking up errors nor handing on theirs. Without tokens all inputs are like that.

    Args:
        hessian: float32 [in_features, in_features], symmetric; not changed.
        settings: Damping and ordering.
        together: Runs of so many columns stay together in the order, in their own.

    Raises:
        QconvError: not finite, or not positive semidefinite even with the strongest damping.
    """
    if not is_finite(hessian):
        raise QconvError(
            "GPTQ: the Hessian holds values that are not finite.",
            hint="The activations overflowed: are the source's weights sound?",
        )
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean(dtype=torch.float64))
    if not mean > torch.finfo(torch.float32).tiny:
        mean = 1.0
    if settings.ordering == "none":
        order = torch.arange(len(hessian), device=hessian.device)
    else:
        runs = torch.argsort(diagonal.view(-1, together).sum(1), descending=True, stable=True)
        order = (runs.unsqueeze(1) * together + torch.arange(together, device=hessian.device)).flatten()
    # torch gives H = L L^T with L lower; with rows and columns reversed, L turned around is upper.
    last_first = order.flip(0)
    # Rows are picked, never columns, which is several times slower; symmetry lets the transpose stand between.
    damped = hessian.index_select(0, last_first).t().contiguous().index_select(0, last_first).div_(mean)
    undamped = damped.diagonal().clone()
    damping, escalations = settings.damp_percent, 0
    while True:
        damped.diagonal().copy_(undamped + damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            break
        if damping > MAX_DAMPING:
            raise QconvError("GPTQ: the Hessian is not positive semidefinite.", hint="It must be a mean of x x^T.")
        damping *= DAMPING_STEP
        escalations += 1
    del damped
    upper = lower.flip((0, 1))
    pivots = upper.diagonal().clone()
    return Factor(order, upper.div_(pivots), pivots.square_(), damping, escalations, int((diagonal == 0.0).sum()))


def is_finite(values: Tensor) -> bool:
    """Whether all float32 values are: the float64 sum of finite ones is finite, and takes one pass."""
    return math.isfinite(float(values.sum(dtype=torch.float64)))


def row_errors(delta: Tensor, hessian: Tensor) -> Tensor:
    """``d H d^T`` of each row d of ``delta``, float32 [out_features, in_features]: float64 [out_features].

    H is symmetric, so products with the blocks above its diagonal count twice and those below are spared.
    """
    errors = torch.zeros(len(delta), dtype=torch.float64, device=delta.device)
    for start in range(0, delta.shape[1], _PANEL):
        stop = start + _PANEL
        panel = delta[:, start:stop]
        product = panel @ hessian[start:stop, start:stop]
        product.addmm_(delta[:, :start], hessian[:start, start:stop], alpha=2.0)
        errors += product.mul_(panel).sum(1, dtype=torch.float64)
    # A sum of squares; rounding alone takes it below zero.
    return errors.clamp_(min=0.0)
