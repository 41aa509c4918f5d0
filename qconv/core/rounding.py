"""Rounding to a grid: the arithmetic that every method shares.

Weights are worked through in blocks of rows small enough for the processor's cache, which is several times faster than
operations on a whole matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from qconv.core import integer_grid
from qconv.core.qtensor import Grid, QTensor
from qconv.core.settings import ClipSettings

_BLOCK_ELEMENTS = 1 << 19


def row_blocks(rows: int, columns: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges ``start, stop`` of rows that together hold about half a million elements.

    Each begins at a multiple of ``multiple`` rows, and so holds at least as many if there are.
    """
    step = max(1, _BLOCK_ELEMENTS // max(columns * multiple, 1)) * multiple
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def group_range(grouped: Tensor, grid: Grid, dim: int | tuple[int, ...] = -1) -> tuple[Tensor, Tensor]:
    """What a group's codes must reach: the lowest value and the span up from it.

    Symmetric: from ``-absmax`` to ``absmax``. Asymmetric: from the minimum to the maximum, widened to hold 0.

    Args:
        grouped: float32, groups along ``dim``.
        grid: The grid.
        dim: The dimensions to reduce.
    """
    return _reach(grouped.amin(dim), grouped.amax(dim), grid)


def _reach(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """:func:`group_range` of groups with these extremes, which are overwritten."""
    if grid.symmetric:
        absmax = torch.maximum(high, -low)
        return -absmax, absmax * 2.0
    low = low.clamp_(max=0.0)
    return low, high.clamp_(min=0.0) - low


def range_parameters(low: Tensor, span: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points for ranges: ``scale = span / (levels - 1)`` and ``zero = round(-low / scale)``.

    The scale is rounded to the grid's scale dtype first, so that codes are chosen for the scale that the file holds.

    Returns:
        scales (``grid.scale_dtype``, positive) and zero points (uint8) or None, of the ranges' shape.
    """
    scales = storable(span / (grid.levels - 1), grid.scale_dtype)
    if grid.symmetric:
        return scales, None
    return scales, torch.round(-low / scales.float()).clamp_(0, grid.levels - 1).to(torch.uint8)


def group_scales(weight: Tensor, grid: Grid) -> Tensor:
    """The scales that each group's range asks for, before they are stored: float32 [rows, groups].

    Args:
        weight: [rows, in_features], any float dtype.
        grid: The grid.
    """
    _, span = _group_ranges(weight, grid)
    return span / (grid.levels - 1)


def grid_parameters(weight: Tensor, grid: Grid, ratio: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points that cover each group's range times ``ratio``.

    Args:
        weight: [rows, in_features], any float dtype.
        grid: The grid.
        ratio: Factor on the range, a number or float32 [rows, groups].

    Returns:
        scales (``grid.scale_dtype`` [rows, groups], positive) and zero points (uint8 [rows, groups]) or None.
    """
    low, span = _group_ranges(weight, grid)
    return range_parameters(low * ratio, span * ratio, grid)


def _group_ranges(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """:func:`group_range` of a weight's groups, float32 [rows, groups] each."""
    groups = grid.groups(weight.shape[1])
    extremes = integer_grid.extremes(weight, groups)
    if extremes is None:
        extremes = _extremes(weight, groups)
    return _reach(*extremes, grid)


def _extremes(weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The smallest and the largest weight of each group, float32 [rows, groups]."""
    low, high = (torch.empty(len(weight), groups, device=weight.device) for _ in range(2))
    for start, stop in row_blocks(*weight.shape):
        block = weight[start:stop].float().view(stop - start, groups, -1)
        torch.amin(block, -1, out=low[start:stop])
        torch.amax(block, -1, out=high[start:stop])
    return low, high


def storable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as a file holds them: in ``dtype``, kept within its normal numbers, and 1 in place of 0.

    Of powers of two (E8M0) each is the least that is not below.
    """
    if dtype is torch.float8_e8m0fnu:
        return powers_of_two(scales)
    limits = torch.finfo(dtype)
    smallest = limits.smallest_normal
    stored = scales.clamp(min=smallest, max=limits.max).to(dtype)
    # A group of zeros can take any scale; 1 keeps subnormal arithmetic out of every reader.
    return torch.where(scales == 0.0, torch.ones_like(stored), stored)


def powers_of_two(scales: Tensor) -> Tensor:
    """The least powers of two that are not below, float8_e8m0fnu: normal numbers of float32, and 1 in place of 0."""
    fractions, exponents = torch.frexp(scales.float())
    exponents = (exponents - (fractions == 0.5).to(exponents.dtype)).clamp_(-126, 127)
    return (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def encode_(grouped: Tensor, scales: Tensor, zero_points: Tensor | None, grid: Grid) -> Tensor:
    """Round to codes in place: ``clamp(round(w / scale) + zero, 0, levels - 1)``, as float32 of ``grouped``'s shape."""
    grouped.div_(scales.float().unsqueeze(-1)).round_()
    return grouped.add_(_zeros(zero_points, grid)).clamp_(0, grid.levels - 1)


def decode_(codes: Tensor, scales: Tensor, zero_points: Tensor | None, grid: Grid) -> Tensor:
    """The inverse, in place: ``(code - zero) * scale``."""
    return codes.sub_(_zeros(zero_points, grid)).mul_(scales.float().unsqueeze(-1))


def _zeros(zero_points: Tensor | None, grid: Grid) -> Tensor | float:
    return float(grid.mid) if zero_points is None else zero_points.float().unsqueeze(-1)


def to_codes(values: Tensor, bits: int) -> Tensor:
    """float32 codes in ``[0, 2**bits)`` as uint8.

    By way of int8, since torch converts to that several times faster.
    """
    if bits < 8:
        return values.to(torch.int8).view(torch.uint8)
    return values.sub(128.0).to(torch.int8).view(torch.uint8).bitwise_xor_(128)


def clip_ratios(clip: ClipSettings) -> list[float]:
    """The ratios that a clipping search tries, from 1 (no clipping) downward."""
    return [1.0 - clip.max_shrink * step / clip.steps for step in range(clip.steps)]


def round_to_nearest(weight: Tensor, grid: Grid, ratios: Tensor | None = None) -> QTensor:
    """Round a weight to nearest.

    Args:
        weight: [out_features, in_features], any float dtype; not changed.
        grid: The grid.
        ratios: Clipping ratios float32 [out_features, groups], or None for the full range.
    """
    scales, zero_points = grid_parameters(weight, grid, 1.0 if ratios is None else ratios)
    codes = integer_grid.encode(weight, scales, zero_points, grid)
    return QTensor(grid, _encode(weight, scales, zero_points, grid) if codes is None else codes, scales, zero_points)


def _encode(weight: Tensor, scales: Tensor, zero_points: Tensor | None, grid: Grid) -> Tensor:
    """Codes, uint8 of the weight's shape."""
    shape = (*scales.shape, weight.shape[1] // scales.shape[1])
    codes = torch.empty(shape, dtype=torch.uint8, device=weight.device)
    for start, stop in row_blocks(*weight.shape):
        block = weight[start:stop].to(torch.float32, copy=True).view_as(codes[start:stop])
        zeros = None if zero_points is None else zero_points[start:stop]
        codes[start:stop] = to_codes(encode_(block, scales[start:stop], zeros, grid), grid.bits)
    return codes.view(weight.shape)


def round_in_place(block: Tensor, grid: Grid, ratio: Tensor | float = 1.0) -> Tensor:
    """Round a block of rows to the grid and back, float32 [rows, in_features], contiguous; returns it."""
    scales, zero_points = grid_parameters(block, grid, ratio)
    if not integer_grid.round_(block, scales, zero_points, grid):
        grouped = block.view(*scales.shape, -1)
        decode_(encode_(grouped, scales, zero_points, grid), scales, zero_points, grid)
    return block


def fake_quantize(weight: Tensor, grid: Grid) -> Tensor:
    """The weight after rounding to the grid and back, float32 [out_features, in_features]; codes are not kept."""
    out = torch.empty(weight.shape, device=weight.device)
    for start, stop in row_blocks(*weight.shape):
        round_in_place(out[start:stop].copy_(weight[start:stop]), grid)
    return out


def rounded_linear(inputs: Tensor, weight: Tensor, grid: Grid, scale: Tensor | None = None) -> Tensor:
    """``inputs @ round(weight * scale).T``, float32 [tokens, out_features]: a linear after plain rounding.

    Each block of rows is scaled, rounded and multiplied while it is in the cache; the rounded weight never exists as a
    whole. The searches spend most of their time here.

    Args:
        inputs: float32 [tokens, in_features], already divided by ``scale``.
        weight: [out_features, in_features], any float dtype; not changed.
        grid: The grid.
        scale: Factors on the columns, float32 [in_features], or None.
    """
    outputs = []
    for start, stop in row_blocks(*weight.shape):
        block = weight[start:stop].to(torch.float32, copy=True)
        if scale is not None:
            block.mul_(scale)
        outputs.append(inputs @ round_in_place(block, grid).t())
    return torch.cat(outputs, dim=1)


def assemble(blocks: Iterable[QTensor], rows: int) -> QTensor:
    """One QTensor of so many rows from consecutive blocks of them; memory holds it and one block.

    All rows of a block share scales with no other block's.
    """
    whole, row, scale_row = None, 0, 0
    for block in blocks:
        if whole is None:
            if len(block.codes) == rows:
                return block
            whole = _empty(block, rows)
        scale_rows = slice(scale_row, scale_row + len(block.scales))
        whole.codes[row : row + len(block.codes)] = block.codes
        whole.scales[scale_rows] = block.scales
        if whole.zero_points is not None and block.zero_points is not None:
            whole.zero_points[scale_rows] = block.zero_points
        if whole.biases is not None and block.biases is not None:
            whole.biases[scale_rows] = block.biases
        row, scale_row = row + len(block.codes), scale_rows.stop
    if whole is None or row != rows:
        raise ValueError(f"blocks of {row} rows in all do not make a weight of {rows}")
    return whole


def _empty(like: QTensor, rows: int) -> QTensor:
    """A QTensor of so many rows, its content undefined, on the grid and of the row length of ``like``."""
    shape = like.grid.scale_shape(rows, like.codes.shape[1])
    return replace(
        like,
        codes=like.codes.new_empty(rows, like.codes.shape[1]),
        scales=like.scales.new_empty(shape),
        zero_points=None if like.zero_points is None else like.zero_points.new_empty(shape),
        biases=None if like.biases is None else like.biases.new_empty(shape),
    )
