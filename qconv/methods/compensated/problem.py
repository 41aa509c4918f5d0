"""A weight on any grid by compensation and refinement, never worse than by the grid's own rounding."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor

from qconv.core.grid import Fit, FittedGrid, PackedT
from qconv.core.hessian import Factor, factorize, is_finite, row_errors
from qconv.core.method import Rounding
from qconv.core.settings import GptqSettings, RefineSettings
from qconv.errors import QconvError
from qconv.methods.compensated.columns import by_gptq
from qconv.methods.compensated.host import OnHost
from qconv.methods.compensated.refinement import refine_

SCALE_EXPONENT = 0.5
"""Scales are searched with each column counting the root of its inputs' mean square, as encoders use an imatrix; which
power it is hardly matters to what compensation makes of them."""


@dataclass(frozen=True, slots=True)
class Rounded(Generic[PackedT]):
    """A rounded weight and what it costs.

    Attributes:
        weight: As files hold it.
        factor: What it was compensated with.
        error: ``trace(d H d^T)`` of the weight's error d, H without damping.
        own_error: The same for the grid's own rounding.
        kept_own: How many output rows were kept as that gives them, since they cost less that way.
    """

    weight: PackedT
    factor: Factor
    error: float
    own_error: float
    kept_own: int


@dataclass(frozen=True, slots=True)
class Problem:
    """The second moments of an input that several linears share, and their factors, made when first needed.

    Products and factors are computed where the second moments and the weights are, on any device; packed weights, and
    whoever rounds to their scales, are on the host.

    Attributes:
        hessian: float32 [in_features, in_features], the mean over tokens of ``x x^T``; not changed.
        settings: How columns are worked through.
        refine: What follows.
        factors: By the number of columns that are rounded together.
        rounding: What chooses the codes.
    """

    hessian: Tensor
    settings: GptqSettings
    refine: RefineSettings
    factors: dict[int, Factor]
    rounding: Rounding = by_gptq

    def factor(self, together: int) -> Factor:
        """The factor whose order keeps runs of so many columns together."""
        if together not in self.factors:
            self.factors[together] = factorize(self.hessian, self.settings, together)
        return self.factors[together]

    def quantize(self, weight: Tensor, grid: FittedGrid[PackedT]) -> Rounded[PackedT]:
        """Round a weight so that the linear's output changes least on the calibration tokens.

        Args:
            weight: float32 [out_features, in_features], finite; not changed.
            grid: Its grid.

        Raises:
            QconvError: the weight or the second moments are not finite, or those not positive semidefinite.
            UsageError: the grid does not fit the weight.
        """
        _require_finite(weight)
        own = self._rows(weight, grid.encode(weight.cpu(), self._importance()))
        fit = OnHost(grid.fit(weight.cpu(), own.weight))
        factor = self.factor(fit.width)
        # In a list, so that what they were made with is gone before their errors are looked at.
        candidates = list(self._candidates(weight, fit, factor))
        found = functools.reduce(_Rows.or_better, (self._rows(weight, one) for one in candidates))
        best = own.or_no_worse(found)
        kept_own = int((own.errors < found.errors).sum())
        return Rounded(best.weight, factor, float(best.errors.sum()), float(own.errors.sum()), kept_own)

    def refined(self, weight: Tensor, grid: FittedGrid[PackedT], found: PackedT) -> tuple[PackedT, float]:
        """Descend from what another method found.

        Args:
            weight: float32 [out_features, in_features], finite; not changed.
            grid: Its grid, which rounds one column at a time.
            found: Where to begin; rows that the descent does not make better are taken from it.

        Returns:
            The weight, and its ``trace(d H d^T)``, H without damping.

        Raises:
            QconvError: the weight or the second moments are not finite, or those not positive semidefinite.
        """
        _require_finite(weight)
        before, fit, factor = self._rows(weight, found), OnHost(grid.fit(weight.cpu(), found)), self.factor(1)
        values = found.dequantize().to(weight.device).t().contiguous()
        columns = weight.t().contiguous()
        refine_(columns, values, fit, self.hessian, factor.damp_percent, self.refine.sweeps, self.refine.refits)
        del columns
        after = before.or_better(self._rows(weight, fit.pack(values)))
        return after.weight, float(after.errors.sum())

    def _candidates(self, weight: Tensor, fit: Fit[PackedT], factor: Factor) -> Iterator[PackedT]:
        """What the method finds, and what refinement makes of it."""
        values = self.rounding(weight.t().contiguous(), fit, self.hessian, self.factor, self.settings)
        yield fit.pack(values)
        if self.refine.sweeps or self.refine.refits:
            columns = weight.t().contiguous()
            refine_(columns, values, fit, self.hessian, factor.damp_percent, self.refine.sweeps, self.refine.refits)
            yield fit.pack(values)

    def _rows(self, weight: Tensor, rounded: PackedT) -> _Rows[PackedT]:
        delta = rounded.dequantize().to(weight.device).sub_(weight)
        return _Rows(rounded, row_errors(delta, self.hessian))

    def _importance(self) -> Tensor | None:
        squares = self.hessian.diagonal()
        return squares.pow(SCALE_EXPONENT).cpu() if bool((squares > 0.0).any()) else None


@dataclass(frozen=True, slots=True)
class _Rows(Generic[PackedT]):
    """A rounded weight, and the ``d H d^T`` of each of its rows: float64 [out_features]."""

    weight: PackedT
    errors: Tensor

    def or_better(self, other: _Rows[PackedT]) -> _Rows[PackedT]:
        """With those rows of ``other`` that cost less."""
        return self._with(other.errors < self.errors, other)

    def or_no_worse(self, other: _Rows[PackedT]) -> _Rows[PackedT]:
        """With those rows of ``other`` that do not cost more."""
        return self._with(other.errors <= self.errors, other)

    def _with(self, chosen: Tensor, other: _Rows[PackedT]) -> _Rows[PackedT]:
        errors = torch.where(chosen, other.errors, self.errors)
        return _Rows(self.weight.with_rows(chosen.cpu(), other.weight), errors)


def _require_finite(weight: Tensor) -> None:
    if not is_finite(weight):
        raise QconvError("GPTQ: the weight holds values that are not finite.")
