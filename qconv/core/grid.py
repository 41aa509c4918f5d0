"""What every grid and every fitted weight offers to the methods that round on it.

Matrices are float32 and transposed, [in_features, out_features]: a column of the weight is one run of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor


class Packed(Protocol):
    """A weight as files hold it."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that it stands for, [out_features, in_features]."""

    def with_rows(self, chosen: Tensor, other: Self) -> Self:
        """The same with the ``chosen`` rows, bool [out_features], of ``other``, which lies on the same grid."""


PackedT = TypeVar("PackedT", bound=Packed)
PackedOutT = TypeVar("PackedOutT", bound=Packed, covariant=True)


@dataclass(slots=True)
class Run:
    """Columns that are rounded one after the other, each taking up a share of the errors of those before it.

    Attributes:
        columns: Their numbers, runs of neighbours of the fit's ``width``.
        targets: [columns, out_features], what each would be rounded from if those before it made no error; overwritten.
        original: The same shape, what an error is counted from; not changed.
        shares: [columns, columns], at i, j what the column j takes up of the error ``original - value`` of an i before
            it. Columns that are rounded together take up nothing of each other, whatever stands there.
        metric: [columns], what a squared error of each counts among those that are rounded together, up to one factor.
        hessian: [columns, columns], or None. With it, columns that are rounded together stay at their original where
            the values would be worse: ``targets`` are then where the loss, whose second derivative it is, is least.
    """

    columns: Sequence[int]
    targets: Tensor
    original: Tensor
    shares: Tensor
    metric: Tensor
    hessian: Tensor | None = None

    def in_turn(self, width: int, nearest: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
        """The values, [columns, out_features].

        Args:
            width: Columns that are rounded together.
            nearest: Gives the values of columns from their first one's number, targets (may be overwritten) and metric.
        """
        errors, chosen = torch.empty_like(self.original), torch.empty_like(self.original)
        for start in range(0, len(self.columns), width):
            stop = start + width
            wanted, original = self.targets[start:stop], self.original[start:stop]
            if start:
                wanted.addmm_(self.shares[:start, start:stop].t(), errors[:start])
            hessian = None if self.hessian is None or width == 1 else self.hessian[start:stop, start:stop]
            optimum = wanted if hessian is None else wanted.clone()
            values = nearest(self.columns[start], wanted, self.metric[start:stop])
            if hessian is not None:
                # Half of what the loss falls by: error^T H (original - optimum) - error^T H error / 2.
                error = original - values
                slope = hessian @ (original - optimum).sub_(error, alpha=0.5)
                values = torch.where((error * slope).sum(0) > 0.0, values, original)
            chosen[start:stop] = values
            torch.sub(original, values, out=errors[start:stop])
        return chosen


@dataclass(slots=True)
class Surroundings:
    """A run of neighbouring columns in the midst of a weight's error, as a descent sees it, who keeps it up to date.

    The loss is ``trace(E^T H E)`` over all columns, E being the weight minus its rounding.

    Attributes:
        first: The number of the first column.
        hessian: [columns, columns], H of these columns; not changed.
        values: [columns, out_features], what they are rounded to.
        gradient: The same shape: their rows of ``H E``.
    """

    first: int
    hessian: Tensor
    values: Tensor
    gradient: Tensor

    def put(self, start: int, values: Tensor) -> None:
        """Replace the values of some columns from ``start`` on, counted from the first, by [columns, out_features]."""
        stop = start + len(values)
        change = values - self.values[start:stop]
        self.values[start:stop] = values
        self.gradient.addmm_(self.hessian[:, start:stop], change, alpha=-1.0)


class Fit(Protocol[PackedOutT]):
    """A weight with its scales fixed."""

    @property
    def width(self) -> int:
        """Columns that are rounded together: 1, or the weights that a lattice's point stands for."""

    @property
    def span(self) -> int:
        """Columns whose scales hang together: one run of them is refitted at a time."""

    def round_(self, run: Run) -> Tensor:
        """The values that columns get, float32 [columns, out_features]: :meth:`Run.in_turn`, or as that would."""

    def refit_(self, first: int, around: Surroundings) -> None:
        """Choose the scales of a span anew for the codes that its values have, so that the loss falls, or keep them.

        Args:
            first: The number of the span's first column.
            around: Holds the span; its values follow the scales.
        """

    def pack(self, values: Tensor) -> PackedOutT:
        """The weight as files hold it, from values that ``round_`` gave, float32 [in_features, out_features]."""


class FittedGrid(Protocol, Generic[PackedT]):
    """A set of values that weights can be put on."""

    @property
    def name(self) -> str:
        """As recipes and reports call it."""

    def encode(self, weight: Tensor, importance: Tensor | None = None) -> PackedT:
        """The grid's own rounding: the least error that its search finds without looking beyond a group.

        Args:
            weight: float32 [out_features, in_features], finite; not changed.
            importance: float32 [in_features], positive, what a squared error of each column counts; None for 1.

        Raises:
            UsageError: the grid does not fit the weight's shape or range.
        """

    def fit(self, weight: Tensor, encoded: PackedT) -> Fit[PackedT]:
        """The scales of an encoded weight, fixed.

        Args:
            weight: float32 [out_features, in_features].
            encoded: What :meth:`encode` made of it.
        """
