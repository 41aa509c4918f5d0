"""What every grid and every fitted weight offers to the methods that round on it.

Matrices are float32 and transposed, [in_features, out_features]: a column of the weight is one run of memory.
"""

from __future__ import annotations

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
class Surroundings:
    """A run of columns in the midst of a weight's error, as a descent sees it; all is kept up to date by it.

    The loss is ``trace(E^T H E)`` over all columns, E being the weight minus its rounding.

    Attributes:
        hessian: [columns, columns], H of these columns; not changed.
        values: [columns, out_features], what they are rounded to.
        gradient: The same shape: their rows of ``H E``.
    """

    hessian: Tensor
    values: Tensor
    gradient: Tensor

    def move(self, first: int, stop: int, change: Tensor) -> None:
        """Add ``change`` [stop - first, out_features] to the values of some columns."""
        self.values[first:stop] += change
        self.gradient.addmm_(self.hessian[:, first:stop], change, alpha=-1.0)


class Fit(Protocol[PackedOutT]):
    """A weight with its scales fixed."""

    @property
    def width(self) -> int:
        """Columns that are rounded together: 1, or the weights that a lattice's point stands for."""

    @property
    def span(self) -> int:
        """Columns whose scales hang together: one run of them is refitted at a time."""

    def round_(self, first: int, targets: Tensor, metric: Tensor) -> Tensor:
        """The nearest values of the columns from ``first`` on.

        Args:
            first: A multiple of ``width``.
            targets: float32 [width, out_features]; may be overwritten.
            metric: float32 [width], what a squared error of each counts, up to one common factor.

        Returns:
            float32 [width, out_features].
        """

    def refit_(self, first: int, around: Surroundings) -> None:
        """Choose the scales of a span anew for the codes that its values have, so that the loss falls, or keep them.

        Args:
            first: The span's first column.
            around: The span; its values follow the scales.
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
