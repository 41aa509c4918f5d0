"""Weights whose codes a type of ggml's holds as they are: whole numbers by groups (Q4_0, Q4_1, Q8_0), and MXFP4.

A block is 32 neighbours of a row: a scale d in float16 and numbers q. Q4_0 stands for ``(q - 8) d`` and Q8_0 for
``q d``, Q4_1 has a base m beside d and stands for ``q d + m``; MXFP4 has an exponent of two for E2M1 codes. In a byte
of two codes the lower half is of the first sixteen (ggml-common.h, ggml-quants.c). Groups of 32 or of a multiple
of it fit; so do zero points, as far as the numbers that result do. Both ways nothing is rounded: what would have to be
is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qconv.core.qtensor import CHANNEL, Grid, QTensor
from qconv.grids.ggml.block_types import GgmlType

BLOCK = 32
GRIDS = {
    GgmlType.Q4_0: Grid(4, BLOCK, True, torch.float16),
    GgmlType.Q4_1: Grid(4, BLOCK, False, torch.float16),
    GgmlType.Q8_0: Grid(8, BLOCK, True, torch.float16),
    GgmlType.MXFP4: Grid(4, BLOCK, True, torch.float8_e8m0fnu, "e2m1"),
}
"""The grids of the types that have one, the smallest first."""
_RANGES = {GgmlType.Q4_0: (-8, 7), GgmlType.Q8_0: (-128, 127)}
"""The whole numbers that a block holds."""


def from_blocks(rows: Tensor, type: GgmlType) -> QTensor | str:
    """The weight that blocks hold, or why it has no grid of codes and scales.

    Args:
        rows: uint8 [out_features, bytes of a row].
        type: One of :data:`GRIDS`.
    """
    grid, (count, _) = GRIDS[type], rows.shape
    size = type.block_bytes
    blocks = rows.reshape(count, -1, size)
    if type is GgmlType.MXFP4:
        return QTensor(grid, _pairs(blocks[..., 1:]), blocks[..., 0].contiguous().view(torch.float8_e8m0fnu), None)
    scales = _halves(blocks[..., :2])
    if type is GgmlType.Q8_0:
        codes = blocks[..., 2:].reshape(count, -1)
        return QTensor(grid, codes ^ 128, scales, None)  # a byte of two's complement, 128 more
    if type is GgmlType.Q4_0:
        return QTensor(grid, _pairs(blocks[..., 2:]), scales, None)
    bases = _halves(blocks[..., 2:4])
    zeros = torch.where(scales == 0, 0.0, -bases.double() / scales.double())
    whole = (zeros == zeros.round()) & (zeros >= 0) & (zeros <= 15) & ((scales != 0) | (bases == 0))
    if not bool(whole.all()):
        return "the bases of its blocks are no whole number of steps"
    return QTensor(grid, _pairs(blocks[..., 4:]), scales, zeros.to(torch.uint8))


def to_blocks(weight: QTensor, type: GgmlType) -> Tensor | str:
    """A weight's blocks, uint8 [out_features, bytes of a row], or why the type does not hold its numbers.

    Args:
        weight: On any grid.
        type: One of :data:`GRIDS`.
    """
    grid, (count, columns) = weight.grid, weight.shape
    if grid.number != GRIDS[type].number:
        return f"{type.name} holds {'E2M1 floats' if type is GgmlType.MXFP4 else 'whole numbers'}"
    if weight.group_index is not None:
        return f"{type.name} has no place for groups of inputs in an order of their own"
    if columns % BLOCK:
        return f"blocks of {BLOCK} do not divide its {columns} input features"
    width = columns if grid.group_size == CHANNEL else grid.width(columns)
    if width % BLOCK:
        return f"{type.name} has blocks of {BLOCK}, and groups of {width} share a scale"
    if type is GgmlType.MXFP4:
        if grid.scale_dtype is not torch.float8_e8m0fnu:
            return "MXFP4 has powers of two for scales"
        return torch.cat([weight.scales.view(torch.uint8).unsqueeze(-1), _halved(weight.codes)], -1).view(count, -1)
    scales = weight.scales.to(torch.float16)
    if not torch.equal(scales.double(), weight.scales.double()):
        return f"{type.name} has scales in float16, of which its own are no numbers"
    repeats = width // BLOCK
    d = scales.repeat_interleave(repeats, 1).unsqueeze(-1)
    if type is GgmlType.Q4_1:
        return _with_bases(weight, d, repeats)
    zeros: Tensor | int = grid.mid
    if weight.zero_points is not None:
        zeros = weight.zero_points.short().repeat_interleave(width, 1)
    numbers = weight.codes.short() - zeros
    lowest, highest = _RANGES[type]
    if int(numbers.min()) < lowest or int(numbers.max()) > highest:
        return f"{type.name} holds whole numbers from {lowest} to {highest}, of which its own are some no"
    if type is GgmlType.Q8_0:
        data = numbers.to(torch.int8).view(torch.uint8).view(count, -1, BLOCK)
    else:
        data = _halved((numbers + 8).to(torch.uint8))
    return torch.cat([d.view(torch.uint8), data], -1).view(count, -1)


def _with_bases(weight: QTensor, d: Tensor, repeats: int) -> Tensor | str:
    """Blocks of Q4_1."""
    if weight.grid.bits > 4:
        return "Q4_1 has 4 bits"
    zeros = torch.full_like(weight.scales, weight.grid.mid, dtype=torch.float64)
    if weight.zero_points is not None:
        zeros = weight.zero_points.double()
    bases = -(zeros * weight.scales.double())
    m = bases.to(torch.float16)
    if not torch.equal(m.double(), bases):
        return "Q4_1 has bases in float16, of which its zero points times scales are no numbers"
    m = m.repeat_interleave(repeats, 1).unsqueeze(-1)
    return torch.cat([d.view(torch.uint8), m.view(torch.uint8), _halved(weight.codes)], -1).view(len(d), -1)


def _halves(pairs: Tensor) -> Tensor:
    """uint8 [rows, blocks, 2] -> float16 [rows, blocks]."""
    return pairs.contiguous().view(torch.float16).squeeze(-1)


def _pairs(packed: Tensor) -> Tensor:
    """uint8 [rows, blocks, 16] -> codes, uint8 [rows, 32 * blocks]."""
    return torch.cat([packed & 15, packed >> 4], -1).flatten(1)


def _halved(codes: Tensor) -> Tensor:
    """The inverse of :func:`_pairs`."""
    blocks = codes.view(len(codes), -1, 2, BLOCK // 2)
    return blocks[:, :, 0] | (blocks[:, :, 1] << 4)
