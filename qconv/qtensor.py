"""The one currency of qconv: a weight as integer codes on a declared grid.

A method turns a weight and its statistics into a :class:`QTensor`; a format turns QTensors into named tensors of a file
and back. Neither knows the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qconv.errors import UsageError

CHANNEL = -1
"""``group_size`` of a grid whose one scale covers a whole output row."""


@dataclass(frozen=True, slots=True)
class Grid:
    """An integer grid: what values a quantized weight can take.

    A weight element is ``(code - zero_point) * scale`` with ``code`` in ``[0, 2**bits)``. Each run of ``group_size``
    elements along the input dimension shares one scale and one zero point. A symmetric grid has the fixed zero point
    ``2**(bits-1)``, so its values reach from ``-2**(bits-1)`` to ``2**(bits-1) - 1`` steps.
    """

    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: torch.dtype

    @property
    def levels(self) -> int:
        """The number of codes."""
        return 1 << self.bits

    @property
    def mid(self) -> int:
        """The zero point of a symmetric grid."""
        return 1 << (self.bits - 1)

    def groups(self, in_features: int) -> int:
        """The number of groups in a row of ``in_features``.

        Raises:
            UsageError: the group size does not divide the row.
        """
        if self.group_size == CHANNEL:
            return 1
        if in_features % self.group_size:
            raise UsageError(
                f"group size {self.group_size} does not divide {in_features} input features",
                hint=f"Choose a group size that divides it: {_divisors_hint(in_features)}.",
            )
        return in_features // self.group_size

    def width(self, in_features: int) -> int:
        """The number of elements that share a scale in a row of ``in_features``."""
        return in_features // self.groups(in_features)

    def bits_per_weight(self, in_features: int) -> float:
        """Bits per weight including scales and, on an asymmetric grid, zero points."""
        scale_bits = torch.finfo(self.scale_dtype).bits
        zero_bits = 0 if self.symmetric else self.bits
        return self.bits + (scale_bits + zero_bits) / self.width(in_features)


def _divisors_hint(in_features: int) -> str:
    sizes = [size for size in (32, 64, 128, 256) if in_features % size == 0]
    return ", ".join(map(str, sizes)) if sizes else "-1 (per channel)"


@dataclass(frozen=True, slots=True)
class QTensor:
    """A quantized 2-D weight of shape [out_features, in_features].

    Attributes:
        grid: The grid that the codes live on.
        codes: uint8 [out_features, in_features], each below ``grid.levels``.
        scales: ``grid.scale_dtype`` [out_features, groups].
        zero_points: uint8 [out_features, groups], or None on a symmetric grid.
    """

    grid: Grid
    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the codes stand for, [out_features, in_features], computed in float32, cast to ``dtype``."""
        rows, columns = self.codes.shape
        grouped = self.codes.view(rows, self.scales.shape[1], -1).float()
        if self.zero_points is None:
            grouped.sub_(float(self.grid.mid))
        else:
            grouped.sub_(self.zero_points.float().unsqueeze(-1))
        grouped.mul_(self.scales.float().unsqueeze(-1))
        return grouped.view(rows, columns).to(dtype)

    def rows(self, start: int, stop: int) -> QTensor:
        """The same weight restricted to output rows ``start:stop``; shares memory."""
        zero_points = None if self.zero_points is None else self.zero_points[start:stop]
        return QTensor(self.grid, self.codes[start:stop], self.scales[start:stop], zero_points)


@dataclass(frozen=True, slots=True)
class SquaredError:
    """Signal and noise of an approximation, as sums that add up over parts of a tensor."""

    signal: float = 0.0
    noise: float = 0.0

    def __add__(self, other: SquaredError) -> SquaredError:
        return SquaredError(self.signal + other.signal, self.noise + other.noise)

    @classmethod
    def between_(cls, reference: Tensor, approximation: Tensor) -> SquaredError:
        """Sums of squares of ``reference`` and of its difference from ``approximation``, which is overwritten.

        Args:
            reference: float32, contiguous, any shape.
            approximation: The same shape and dtype.
        """
        signal = reference.view(-1)
        error = approximation.view(-1).sub_(signal)
        return cls(float(torch.dot(signal, signal)), float(torch.dot(error, error)))

    @property
    def snr_db(self) -> float:
        """Signal to noise ratio in decibels; infinite for an exact copy."""
        if self.noise == 0.0:
            return math.inf
        if self.signal == 0.0:
            return -math.inf
        return 10.0 * math.log10(self.signal / self.noise)
