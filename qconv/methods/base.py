"""Rounding to a grid: the arithmetic that every method shares.

Weights are worked through in blocks of rows small enough for the processor's cache, which is several times faster than
operations on a whole matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qconv.qtensor import Grid, QTensor
from qconv.recipe import ClipSettings

_BLOCK_ELEMENTS = 1 << 19


def row_blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Ranges ``start, stop`` of rows that together hold about half a million elements."""
    step = max(1, _BLOCK_ELEMENTS // max(columns, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def grid_parameters(grouped: Tensor, grid: Grid, ratio: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points that cover each group's range times ``ratio``.

    Symmetric: ``scale = absmax / ((levels - 1) / 2)``. Asymmetric: the range is widened to hold 0,
    ``scale = (max - min) / (levels - 1)`` and ``zero = round(-min / scale)``. The scale is rounded to the grid's scale
    dtype first, so that codes are chosen for the scale that the file will hold.

    Args:
        grouped: float32 [rows, groups, width].
        grid: The grid.
        ratio: Factor on the range, a number or float32 [rows, groups].

    Returns:
        scales (``grid.scale_dtype`` [rows, groups], positive) and zero points (uint8 [rows, groups]) or None.
    """
    if grid.symmetric:
        span = grouped.abs().amax(-1) * ratio * 2.0
        low = None
    else:
        low = grouped.amin(-1).clamp_(max=0.0) * ratio
        span = grouped.amax(-1).clamp_(min=0.0) * ratio - low
    scales = _storable(span / (grid.levels - 1), grid.scale_dtype)
    if low is None:
        return scales, None
    zero_points = torch.round(-low / scales.float()).clamp_(0, grid.levels - 1).to(torch.uint8)
    return scales, zero_points


def _storable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    limits = torch.finfo(dtype)
    smallest = limits.smallest_normal
    stored = scales.clamp(min=smallest, max=limits.max).to(dtype)
    # A group of zeros can take any scale; 1 keeps subnormal arithmetic out of every reader.
    return torch.where(scales == 0.0, torch.ones_like(stored), stored)


def encode_(grouped: Tensor, scales: Tensor, zero_points: Tensor | None, grid: Grid) -> Tensor:
    """Round to codes in place: ``clamp(round(w / scale) + zero, 0, levels - 1)``, as float32 of ``grouped``'s shape."""
    grouped.div_(scales.float().unsqueeze(-1)).round_()
    zero = float(grid.mid) if zero_points is None else zero_points.float().unsqueeze(-1)
    return grouped.add_(zero).clamp_(0, grid.levels - 1)


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


def round_block(block: Tensor, grid: Grid, ratio: Tensor | None = None) -> QTensor:
    """Round a block of rows to nearest.

    Args:
        block: [rows, in_features], any float dtype; not changed.
        grid: The grid.
        ratio: Clipping ratios float32 [rows, groups], or None for the full range.
    """
    rows, columns = block.shape
    grouped = block.to(torch.float32, copy=True).view(rows, grid.groups(columns), -1)
    scales, zero_points = grid_parameters(grouped, grid, 1.0 if ratio is None else ratio)
    codes = to_codes(encode_(grouped, scales, zero_points, grid), grid.bits).view(rows, columns)
    return QTensor(grid, codes, scales, zero_points)


def fake_quantize(weight: Tensor, grid: Grid, ratio: Tensor | None = None) -> Tensor:
    """The weight after rounding to the grid and back, float32 [out_features, in_features]; codes are not kept.

    Args:
        weight: float32 [out_features, in_features].
        grid: The grid.
        ratio: Clipping ratios float32 [out_features, groups], or None for the full range.
    """
    out = torch.empty_like(weight)
    rows, columns = weight.shape
    groups = grid.groups(columns)
    for start, stop in row_blocks(rows, columns):
        grouped = out[start:stop].copy_(weight[start:stop]).view(stop - start, groups, -1)
        scales, zero_points = grid_parameters(grouped, grid, 1.0 if ratio is None else ratio[start:stop])
        encode_(grouped, scales, zero_points, grid)
        grouped.sub_(float(grid.mid) if zero_points is None else zero_points.float().unsqueeze(-1))
        grouped.mul_(scales.float().unsqueeze(-1))
    return out


def assemble(blocks: list[QTensor]) -> QTensor:
    """One QTensor from consecutive blocks of rows."""
    if len(blocks) == 1:
        return blocks[0]
    zero_points = [block.zero_points for block in blocks if block.zero_points is not None]
    return QTensor(
        blocks[0].grid,
        torch.cat([block.codes for block in blocks]),
        torch.cat([block.scales for block in blocks]),
        torch.cat(zero_points) if zero_points else None,
    )
