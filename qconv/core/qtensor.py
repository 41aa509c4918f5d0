"""The one currency of qconv: a weight as codes on a declared grid.

A method turns a weight and its statistics into a :class:`QTensor`; a format turns QTensors into named tensors of a file
and back. Neither knows the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from qconv.core.number import Number as Number
from qconv.errors import UsageError

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""E2M1 (OCP Microscaling Formats 1.0, section 5.3.3) by the lower three bits of a code; the fourth is the sign."""
E2M1_VALUES = (*E2M1_MAGNITUDES, *(-magnitude for magnitude in E2M1_MAGNITUDES))
"""By all four bits."""
CHANNEL = -1
"""``group_size`` of a grid whose one scale covers a whole output row, ``block_rows`` of one whose covers all rows."""


@dataclass(frozen=True, slots=True)
class Grid:
    """What values a quantized weight can take, and which of its elements share a scale.

    On an integer grid an element is ``(code - zero_point) * scale`` with ``code`` in ``[0, 2**bits)``. Each run of
    ``group_size`` elements along the input dimension shares one scale and one zero point. A symmetric grid has the
    fixed zero point ``2**(bits-1)``, so its values reach from ``-2**(bits-1)`` to ``2**(bits-1) - 1`` steps. On
    one that is ``based`` an element is ``code * scale + bias``, each group with a bias of its own (MLX's affine mode).

    On a float grid an element is ``code * scale`` with ``code`` a float: E4M3 (float8), or E2M1. Blocks of
    ``block_rows`` times ``group_size`` elements share a scale; of E4M3 the last ones of a row or column may be smaller.
    Scales in E4M3 have a global scale beside them, which all of a weight share (NVFP4); scales in E8M0 are powers of
    two (MXFP4, MXFP8).

    Attributes:
        bits: Bits of a code.
        group_size: Elements along the input dimension that share a scale; :data:`CHANNEL` for the whole row.
        symmetric: Whether the zero point is fixed.
        scale_dtype: The dtype in which scales are stored.
        number: What a code is.
        block_rows: Output rows that share a scale, on a float grid; :data:`CHANNEL` for all of them.
        act_order: Whether groups are made of columns in an order of their own, which each weight carries with it.
        activations: How an engine quantizes a linear's inputs: not at all, by their own range, by a stored scale, or
            (``local``) by the range of each group of them, in units of a stored scale.
        activation_number: What it rounds them to, where it does: integers of 8 bits, E4M3 or E2M1 floats.
        based: Whether a group of integers has a bias, of the scales' dtype, in the place of a zero point.
    """

    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: torch.dtype
    number: Number = "int"
    block_rows: int = 1
    act_order: bool = False
    activations: Literal["none", "dynamic", "static", "local"] = "none"
    activation_number: Number = "e4m3"
    based: bool = False

    @property
    def levels(self) -> int:
        """The number of codes of an integer grid."""
        return 1 << self.bits

    @property
    def mid(self) -> int:
        """The zero point of a symmetric integer grid."""
        return 1 << (self.bits - 1)

    @property
    def is_float(self) -> bool:
        """Whether codes are floating-point numbers."""
        return self.number != "int"

    @property
    def stores_inputs(self) -> bool:
        """Whether a scale of a linear's inputs is stored beside its weight."""
        return self.activations in ("static", "local")

    @property
    def has_global_scale(self) -> bool:
        """Whether a weight's scales have one scale of their own, which linears that engines fuse must share."""
        return self.scale_dtype is torch.float8_e4m3fn

    def groups(self, in_features: int) -> int:
        """The number of scales along a row of ``in_features``.

        Raises:
            UsageError: the group size does not divide the row, on any grid but that of E4M3 floats.
        """
        if self.group_size == CHANNEL:
            return 1
        if self.number == "e4m3":
            return -(-in_features // self.group_size)
        if in_features % self.group_size:
            raise UsageError(
                f"group size {self.group_size} does not divide {in_features} input features",
                hint=f"Choose a group size that divides it: {_divisors_hint(in_features)}.",
            )
        return in_features // self.group_size

    def width(self, in_features: int) -> int:
        """The number of elements of a row of ``in_features`` that share a scale; the last group may have fewer."""
        if self.is_float and self.group_size != CHANNEL:
            return self.group_size
        return in_features // self.groups(in_features)

    def rows_sharing(self, out_features: int) -> int:
        """The number of rows that share a scale; the last ones may be fewer."""
        return out_features if self.block_rows == CHANNEL else self.block_rows

    @property
    def row_multiple(self) -> int:
        """Blocks of rows that begin at multiples of it share scales with no other block, unless all rows share one."""
        return 1 if self.block_rows == CHANNEL else self.block_rows

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """The shape of a weight's scales: [out_features, groups], on a float grid [blocks down, blocks across]."""
        return -(-out_features // self.rows_sharing(out_features)), self.groups(in_features)


def _divisors_hint(in_features: int) -> str:
    sizes = [size for size in (32, 64, 128, 256) if in_features % size == 0]
    return ", ".join(map(str, sizes)) if sizes else "-1 (per channel)"


@dataclass(frozen=True, slots=True)
class QTensor:
    """A quantized 2-D weight of shape [out_features, in_features].

    Attributes:
        grid: The grid that the codes live on.
        codes: [out_features, in_features]; uint8, each below ``grid.levels``, or float8_e4m3fn on a grid of those.
        scales: ``grid.scale_dtype`` of ``grid.scale_shape``.
        zero_points: uint8 of the scales' shape, or None on a grid that is symmetric or based.
        group_index: int32 [in_features], the group of each input, on a grid with ``act_order``; else None, and groups
            are runs of neighbours.
        input_scale: float32 [], what an engine divides the linear's inputs by, on a grid with static activations; with
            local ones float64, so that it is also exact enough where files hold its inverse.
        global_scale: What all scales are multiplied by, on a grid with a global scale. In double precision, so that
            scales come out the same in float32 whether a file holds it or its inverse.
        biases: What codes of 0 stand for, of the scales' dtype and shape, on a grid that is based; else None.
    """

    grid: Grid
    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    group_index: Tensor | None = None
    input_scale: Tensor | None = None
    global_scale: float = 1.0
    biases: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the codes stand for, [out_features, in_features], computed in float32, cast to ``dtype``."""
        if self.grid.is_float:
            return self._floats().mul_(self._spread(self.steps())).to(dtype)
        if self.group_index is not None:
            zeros = float(self.grid.mid) if self.zero_points is None else self._spread(self.zero_points)
            return self.codes.float().sub_(zeros).mul_(self._spread(self.scales)).to(dtype)
        rows, columns = self.codes.shape
        grouped = self.codes.view(rows, self.scales.shape[1], -1).float()
        if self.biases is not None:
            grouped.mul_(self.scales.float().unsqueeze(-1)).add_(self.biases.float().unsqueeze(-1))
            return grouped.view(rows, columns).to(dtype)
        if self.zero_points is None:
            grouped.sub_(float(self.grid.mid))
        else:
            grouped.sub_(self.zero_points.float().unsqueeze(-1))
        grouped.mul_(self.scales.float().unsqueeze(-1))
        return grouped.view(rows, columns).to(dtype)

    def to(self, device: torch.device) -> QTensor:
        """The same weight with its tensors on a device; itself where they are there already."""
        if self.codes.device == device:
            return self
        tensors = {
            "codes": self.codes,
            "scales": self.scales,
            "zero_points": self.zero_points,
            "group_index": self.group_index,
            "input_scale": self.input_scale,
            "biases": self.biases,
        }
        moved = {name: None if tensor is None else tensor.to(device) for name, tensor in tensors.items()}
        return QTensor(self.grid, global_scale=self.global_scale, **moved)  # type: ignore[arg-type]

    def steps(self) -> Tensor:
        """What codes are multiplied by, float32 of the scales' shape."""
        if not self.grid.has_global_scale:
            return self.scales.float()
        return (self.scales.double() * self.global_scale).float()

    def _floats(self) -> Tensor:
        """The floats that codes are, float32 [out_features, in_features]."""
        if self.grid.number == "e4m3":
            return self.codes.float()
        table = torch.tensor(E2M1_VALUES, device=self.codes.device)
        return table.index_select(0, self.codes.flatten().int()).view(self.codes.shape)

    def _spread(self, parameters: Tensor) -> Tensor:
        """Scales or zero points as each element sees them, float32, broadcastable to the weight."""
        rows, columns = self.codes.shape
        spread = parameters.float()
        if len(spread) != rows:
            spread = spread.repeat_interleave(self.grid.rows_sharing(rows), 0)[:rows]
        if self.group_index is not None:
            return spread.index_select(1, self.group_index)
        if spread.shape[1] == 1:
            return spread
        return spread.repeat_interleave(self.grid.width(columns), 1)[:, :columns]

    def rows(self, start: int, stop: int) -> QTensor:
        """The same weight restricted to output rows ``start:stop``; shares memory.

        ``start`` must be a multiple of the rows that share a scale.
        """
        sharing = self.grid.rows_sharing(len(self.codes))
        first, last = start // sharing, -(-stop // sharing)
        zero_points = None if self.zero_points is None else self.zero_points[first:last]
        scales, biases = self.scales[first:last], None if self.biases is None else self.biases[first:last]
        return replace(self, codes=self.codes[start:stop], scales=scales, zero_points=zero_points, biases=biases)

    def with_rows(self, chosen: Tensor, other: QTensor) -> QTensor:
        """The same with the ``chosen`` rows, bool [out_features], of ``other``, which lies on the same grid.

        Raises:
            ValueError: rows that share scales have other ones in ``other``, its global scale is another, or its groups
                are made otherwise.
        """
        if self.global_scale != other.global_scale:
            raise ValueError("rows of a weight with another global scale cannot be taken over")
        shared = len(self.scales) != len(self.codes)
        same = (self.group_index is None) == (other.group_index is None) and (
            self.group_index is None or other.group_index is None or torch.equal(self.group_index, other.group_index)
        )
        if not same or (shared and not torch.equal(self.scales, other.scales)):
            raise ValueError("rows of a weight whose scales or groups are others cannot be taken over")
        chosen = chosen.unsqueeze(1)
        codes = _where(chosen, other.codes, self.codes)
        zero_points = self.zero_points
        if zero_points is not None and other.zero_points is not None:
            zero_points = torch.where(chosen, other.zero_points, zero_points)
        biases = self.biases
        if biases is not None and other.biases is not None:
            biases = torch.where(chosen, other.biases, biases)
        scales = self.scales if shared else _where(chosen, other.scales, self.scales)
        return replace(self, codes=codes, scales=scales, zero_points=zero_points, biases=biases)


def _where(chosen: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """``torch.where`` for all dtypes: it knows no floats of 8 bits."""
    if first.element_size() > 1:
        return torch.where(chosen, first, second)
    return torch.where(chosen, first.view(torch.uint8), second.view(torch.uint8)).view(first.dtype)


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
        return cls(_sum_of_squares(signal), _sum_of_squares(error))

    @property
    def snr_db(self) -> float:
        """Signal to noise ratio in decibels; infinite for an exact copy."""
        if self.noise == 0.0:
            return math.inf
        if self.signal == 0.0:
            return -math.inf
        return 10.0 * math.log10(self.signal / self.noise)


def _sum_of_squares(values: Tensor) -> float:
    """Of a float32 vector, in double precision: then it depends neither on the processor nor on how it is divided."""
    parts = (part.double() for part in torch.split(values, 1 << 16))
    return sum(float(torch.dot(part, part)) for part in parts)
