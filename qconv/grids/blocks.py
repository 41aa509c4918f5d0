"""ggml's block types as grids: the encoder's own search fixes the scales, which are read back from its bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from gguf.quants import IQ4_NL, dequantize
from torch import Tensor
from torch.nn import functional

from qconv.core.grid import Fit
from qconv.core.rounding import row_blocks
from qconv.errors import UsageError
from qconv.grids.ggml import GgmlType, affine, direct, encode, scaled, shifted, signed
from qconv.grids.ggml.affine import AffineGrid
from qconv.grids.ggml.fields import read_scales, read_shifts
from qconv.grids.ggml.lattice import lattice
from qconv.grids.ggml.numeric import as_half
from qconv.grids.ggml.scaled import ScaledGrid
from qconv.grids.ggml.searched import SEARCHES, Search
from qconv.grids.ggml.shifted import ShiftedGrid
from qconv.grids.ggml.signed import SignedGrid
from qconv.grids.lattices import LatticeFit, codes_of
from qconv.grids.nearest import E2M1_DOUBLED, Codebook, Integers, Nearest
from qconv.grids.scales import Scales, SuperScales
from qconv.grids.shifted_lattices import ShiftedFit, encoded_of
from qconv.grids.steps import StepFit

_PLAIN = (GgmlType.F32, GgmlType.F16, GgmlType.BF16)


@dataclass(frozen=True, slots=True)
class BlockTensor:
    """A weight as rows of ggml blocks.

    Attributes:
        type: Of the blocks.
        data: uint8 [out_features, bytes of a row].
    """

    type: GgmlType
    data: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        rows, nbytes = self.data.shape
        return rows, nbytes // self.type.block_bytes * self.type.block_elements

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the blocks stand for, [out_features, in_features], as the gguf package decodes it."""
        dense = torch.empty(self.shape, dtype=dtype)
        for start, stop in row_blocks(*self.shape):
            dense[start:stop] = torch.from_numpy(dequantize(self.data[start:stop].numpy(), self.type.value))
        return dense

    def with_rows(self, chosen: Tensor, other: BlockTensor) -> BlockTensor:
        """The same with the ``chosen`` rows, bool [out_features], of ``other``."""
        return replace(self, data=torch.where(chosen.unsqueeze(1), other.data, self.data))


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """The values that a ggml type can take.

    Attributes:
        type: Which one.
    """

    type: GgmlType

    @property
    def name(self) -> str:
        """As ggml calls the type."""
        return self.type.name

    @property
    def has_codes(self) -> bool:
        """Whether there is anything to choose: not for plain floats."""
        return self.type not in _PLAIN

    def encode(self, weight: Tensor, importance: Tensor | None = None) -> BlockTensor:
        """See :class:`qconv.core.grid.FittedGrid`; :func:`qconv.grids.ggml.encode`."""
        return BlockTensor(self.type, encode(weight, self.type, importance))

    def fit(self, weight: Tensor, encoded: BlockTensor) -> Fit[BlockTensor]:
        """See :class:`qconv.core.grid.FittedGrid`.

        Raises:
            UsageError: a type of plain floats, whose values nothing scales.
        """
        if not self.has_codes:
            raise UsageError(f"{self.name} has no scales to fit.", hint="Round it to nearest.")
        kind, rows = _kind(self.type), len(weight)
        found = read_scales(encoded.data.view(-1, self.type.block_bytes), self.type)
        steps = _by_column(found.d * found.multiples * kind.unit, rows)
        bases = None
        if found.dmin is not None and found.lows is not None:
            sign = 1.0 if kind.top is None else -1.0
            bases = _by_column(sign * found.dmin * found.lows, rows)
        width = self.type.block_elements // kind.subblocks
        scales = Scales(width=width, steps=steps, bases=bases, store=kind.store)
        if kind.nearest is not None:
            scales = SuperScales(
                width=width,
                steps=steps,
                bases=bases,
                store=kind.store,
                count=kind.subblocks,
                d=_by_column(found.d.unsqueeze(0), rows),
                integers=_by_column(found.multiples, rows),
                dmin=None if found.dmin is None else _by_column(found.dmin.unsqueeze(0), rows),
                lows=None if found.lows is None else _by_column(found.lows, rows),
                nearest=kind.nearest,
                top=kind.top or 0,
                unit=kind.unit,
            )
        if isinstance(kind.grid, SignedGrid):
            return LatticeFit(scales, kind.grid, kind.packing(self.type))
        if isinstance(kind.grid, ShiftedGrid):
            shifts = read_shifts(encoded.data.view(-1, self.type.block_bytes), self.type)
            by_column = None if shifts is None else _by_column(shifts, rows)
            return ShiftedFit(scales, kind.grid, by_column, kind.packing(self.type))
        assert kind.codes is not None
        return StepFit(scales, kind.codes, kind.packing(self.type))


@dataclass(frozen=True, slots=True)
class _Kind:
    """How a type's codes and scales may move.

    Attributes:
        grid: What its search looks for; None for a type without one.
        subblocks: Of a block.
        codes: Of an element; None for a lattice.
        pack: Gives the bytes.
        nearest: Gives the nearest integer of a sub-block's scale; None where a block has a scale of its own.
        top: The highest integer of a sub-block's base; None where there is none.
        unit: What integers are counted in.
        store: Rounds scales that stand for themselves.
    """

    grid: AffineGrid | ScaledGrid | SignedGrid | ShiftedGrid | None
    subblocks: int
    codes: Nearest | None
    pack: Callable[[Any], Tensor]
    nearest: Callable[[Tensor], Tensor] | None = None
    top: int | None = None
    unit: float = 1.0
    store: Callable[[Tensor], Tensor] = as_half

    def packing(self, type: GgmlType) -> Callable[[Scales, Tensor], BlockTensor]:
        """What makes blocks of values [in_features, out_features] and the scales they belong to."""

        def packed(scales: Scales, values: Tensor) -> BlockTensor:
            return BlockTensor(type, torch.cat([self._blocks(type, *part[1:]) for part in scales.by_rows(values)]))

        return packed

    def _blocks(self, type: GgmlType, scales: Scales, codes: Tensor) -> Tensor:
        """Rows of blocks, uint8, of codes [in_features, out_features]."""
        columns, rows = codes.shape
        in_row = columns // type.block_elements
        padding = -rows * in_row % 64
        elements = functional.pad(_by_block(codes, in_row, self.subblocks), (0, padding)).contiguous()
        data = self.pack(self._encoded(scales, elements, in_row, padding))
        return data[: rows * in_row].reshape(rows, -1)

    def _encoded(self, scales: Scales, codes: Tensor, in_row: int, padding: int) -> Any:
        """What the search would have found: codes float32 [elements, sub-blocks, blocks]."""

        def by_block(parts: Tensor) -> Tensor:
            """[groups, out_features] -> [groups of a block, blocks]."""
            grouped = parts.reshape(in_row, -1, parts.shape[1]).permute(1, 2, 0).flatten(1)
            return functional.pad(grouped, (0, padding)).contiguous()

        if isinstance(scales, SuperScales):
            d, integers = by_block(scales.d)[0], by_block(scales.integers)
        else:
            integers = by_block(scales.steps)
            d = torch.ones_like(integers[0])
        if isinstance(self.grid, AffineGrid):
            if isinstance(scales, SuperScales) and scales.dmin is not None and scales.lows is not None:
                return affine.Encoded(codes, integers, by_block(scales.lows), d, by_block(scales.dmin)[0])
            assert scales.bases is not None
            return affine.Encoded(codes, integers, by_block(scales.bases), d, d)
        if isinstance(self.grid, SignedGrid):
            found = lattice(self.grid.type, codes.device)
            return signed.Encoded(codes_of(codes.abs(), found), codes < 0.0, (integers - 1.0).clamp_(min=0.0) / 2.0, d)
        if isinstance(self.grid, ShiftedGrid):
            return encoded_of(codes, integers, d, self.grid)
        return scaled.Encoded(codes, integers, d)


def _kind(type: GgmlType) -> _Kind:
    if type is GgmlType.Q8_0:
        return _Kind(None, 1, Integers(-127.0, 127.0), direct.pack_q8_0)
    if type is GgmlType.MXFP4:
        return _Kind(None, 1, E2M1_DOUBLED, direct.pack_mxfp4, store=_power_of_two)
    search: Search[Any, Any] = SEARCHES[type]
    grid = search.grid
    if isinstance(grid, SignedGrid):
        return _Kind(grid, search.subblocks, None, search.pack, _OddNumbers(signed.ENDS[0]), unit=grid.unit)
    if isinstance(grid, ShiftedGrid):
        return _Kind(grid, search.subblocks, None, search.pack, _OddNumbers(shifted.ENDS[0]), unit=grid.unit)
    if isinstance(grid, AffineGrid):
        top = grid.top
        nearest = None if top is None else Integers(0.0, float(top))
        return _Kind(grid, search.subblocks, Integers(0.0, float(grid.levels)), search.pack, nearest, top)
    nearest = None if grid.top is None else Integers(float(-grid.top), float(grid.top - 1))
    codes = grid.nearest if isinstance(grid.nearest, Integers) else _IQ4
    return _Kind(grid, search.subblocks, codes, search.pack, nearest)


_IQ4 = Codebook(torch.tensor(IQ4_NL.kvalues, dtype=torch.float32))


@dataclass(frozen=True, slots=True)
class _OddNumbers:
    """The nearest odd number from 1 to the largest."""

    largest: float

    def __call__(self, multiples: Tensor) -> Tensor:
        return ((multiples - 1.0) / 2.0).round_().mul_(2.0).add_(1.0).clamp_(1.0, self.largest)


def _power_of_two(scales: Tensor) -> Tensor:
    return torch.exp2(torch.log2(scales.clamp(min=2.0**-126)).round_().clamp_(-126.0, 126.0))


def _by_column(parts: Tensor, rows: int) -> Tensor:
    """[parts of a block, blocks] -> [parts of a row, out_features], contiguous."""
    in_row = parts.shape[1] // rows
    return parts.view(len(parts), rows, in_row).permute(2, 0, 1).reshape(-1, rows)


def _by_block(codes: Tensor, in_row: int, subblocks: int) -> Tensor:
    """[in_features, out_features] -> [elements, sub-blocks, blocks], blocks row by row."""
    columns, rows = codes.shape
    grouped = codes.view(in_row, subblocks, columns // (in_row * subblocks), rows)
    return grouped.permute(2, 1, 3, 0).reshape(grouped.shape[2], subblocks, rows * in_row)
