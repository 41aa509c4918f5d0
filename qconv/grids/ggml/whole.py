"""Weights whose codes a type of ggml's holds as they are: whole numbers by groups (Q4_0, Q4_1, Q8_0), MXFP4 and NVFP4.

A block is 32 neighbours of a row: a scale d in float16 and numbers q. Q4_0 stands for ``(q - 8) d`` and Q8_0 for
``q d``, Q4_1 has a base m beside d and stands for ``q d + m``; MXFP4 has an exponent of two for E2M1 codes. In a byte
of two codes the lower half is of the first sixteen (ggml-common.h, ggml-quants.c). Groups of 32 or of a multiple
of it fit; so do zero points, as far as the numbers that result do. A block of NVFP4 is 64 neighbours: four scales in
E4M3, each of 16 of them, whose codes stand eight beside eight; the global scale that all of a weight share is no part
of it, but a tensor of its own (``.scale``). Both ways nothing is rounded: what would have to be is refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from qconv.core.qtensor import CHANNEL, Grid, QTensor

T: TypeAlias = GGMLQuantizationType

BLOCK = 32
_SIXTEEN, _FOUR = 16, 4
"""Of NVFP4: weights that share a scale, and scales of a block."""
_NO_SCALE = 0x7F
"""The first byte that is none: NaN, and what has a sign."""
GRIDS = {
    T.Q4_0: Grid(4, BLOCK, True, torch.float16),
    T.Q4_1: Grid(4, BLOCK, False, torch.float16),
    T.Q8_0: Grid(8, BLOCK, True, torch.float16),
    T.MXFP4: Grid(4, BLOCK, True, torch.float8_e8m0fnu, "e2m1"),
    T.NVFP4: Grid(4, _SIXTEEN, True, torch.float8_e4m3fn, "e2m1"),
}
"""The grids of the types that have one, the smallest first."""
_RANGES = {T.Q4_0: (-8, 7), T.Q8_0: (-128, 127)}
"""The whole numbers that a block holds."""


SIGNED = Grid(4, BLOCK, False, torch.float16)
"""Of Q4_0 where some scales are negative, which no engine expects: ``(q - 8) d`` is ``(15 - q - 7) |d|``."""


def has_negative_scales(rows: Tensor, type: T) -> bool:
    """Whether a scale of whole numbers is negative, as ggml's encoder of Q4_0 leaves half of them.

    Args:
        rows: uint8 [out_features, bytes of a row].
        type: One of :data:`GRIDS`.
    """
    if type in (T.MXFP4, T.NVFP4):
        return False
    scales = _halves(rows.reshape(len(rows), -1, GGML_QUANT_SIZES[type][1])[..., :2])
    return bool((scales < 0).any())


def from_blocks(rows: Tensor, type: T, *, signed: bool = False, global_scale: float = 1.0) -> QTensor | str:
    """The weight that blocks hold, its scales positive, or why it has no grid of codes and scales.

    Args:
        rows: uint8 [out_features, bytes of a row].
        type: One of :data:`GRIDS`.
        signed: Of Q4_0: on :data:`SIGNED`, which negative scales need.
        global_scale: Of NVFP4: what all scales are multiplied by.
    """
    grid, count = GRIDS[type], len(rows)
    blocks = rows.reshape(count, -1, GGML_QUANT_SIZES[type][1])
    if type is T.MXFP4:
        return QTensor(grid, _pairs(blocks[..., 1:]), blocks[..., 0].contiguous().view(torch.float8_e8m0fnu), None)
    if type is T.NVFP4:
        if bool((blocks[..., :_FOUR] >= _NO_SCALE).any()):
            return "a scale of its blocks is no positive number"
        codes = _pairs(blocks[..., _FOUR:].reshape(count, -1, _SIXTEEN // 2))
        found = blocks[..., :_FOUR].reshape(count, -1).view(torch.float8_e4m3fn)
        return QTensor(grid, codes, found, None, global_scale=global_scale)
    scales = _halves(blocks[..., :2])
    if not bool(torch.isfinite(scales).all()):
        return "a scale of its blocks is not finite"
    negative, empty = scales < 0, scales == 0
    positive = torch.where(empty, 1.0, scales.abs())
    spread = [one.unsqueeze(-1).expand(-1, -1, BLOCK).reshape(count, -1) for one in (negative, empty)]
    if type is T.Q8_0:
        numbers = blocks[..., 2:].contiguous().view(torch.int8).view(count, -1).short()
        numbers = torch.where(spread[0], -numbers, numbers).masked_fill_(spread[1], 0)
        if bool((numbers > 127).any()):
            return "-128 times a negative scale is no code"
        return QTensor(grid, (numbers + 128).to(torch.uint8), positive, None)
    if type is T.Q4_0:
        codes = _pairs(blocks[..., 2:])
        if not signed:
            codes = codes.masked_fill_(spread[1], 8)
            return "some of its scales are negative" if bool(negative.any()) else QTensor(grid, codes, positive, None)
        codes = torch.where(spread[0], 15 - codes, codes).masked_fill_(spread[1], 8)
        return QTensor(SIGNED, codes, positive, torch.where(negative, 7, 8).to(torch.uint8))
    if bool((negative | empty).any()):
        return "some of its scales are not positive"
    zeros = -_halves(blocks[..., 2:4]).double() / scales.double()
    if not bool(((zeros == zeros.round()) & (zeros >= 0) & (zeros <= 15)).all()):
        return "the bases of its blocks are no whole number of steps"
    return QTensor(grid, _pairs(blocks[..., 4:]), scales, zeros.to(torch.uint8))


def misfit(weight: QTensor, type: T) -> str | None:
    """Why a type does not hold a weight's numbers; None where it does.

    Args:
        weight: On any grid.
        type: One of :data:`GRIDS`.
    """
    grid, columns = weight.grid, weight.shape[1]
    if grid.number != GRIDS[type].number:
        return f"{type.name} holds {'whole numbers' if GRIDS[type].number == 'int' else 'E2M1 floats'}"
    if weight.group_index is not None:
        return f"{type.name} has no place for groups of inputs in an order of their own"
    if type is T.NVFP4:
        return _nvfp4_misfit(weight)
    if columns % BLOCK:
        return f"blocks of {BLOCK} do not divide its {columns} input features"
    width = columns if grid.group_size == CHANNEL else grid.width(columns)
    if width % BLOCK:
        return f"{type.name} has blocks of {BLOCK}, and groups of {width} share a scale"
    if type is T.MXFP4:
        return None if grid.scale_dtype is torch.float8_e8m0fnu else "MXFP4 has powers of two for scales"
    if not torch.equal(weight.scales.to(torch.float16).double(), weight.scales.double()):
        return f"{type.name} has scales in float16, of which its own are no numbers"
    if type is T.Q4_1:
        if grid.bits > 4:
            return "Q4_1 has 4 bits"
        bases = _bases(weight)
        if not torch.equal(bases.to(torch.float16).double(), bases):
            return "Q4_1 has bases in float16, of which its zero points times scales are no numbers"
        return None
    lowest, highest = _RANGES[type]
    if weight.zero_points is None and lowest <= -grid.mid and grid.mid - 1 <= highest:
        return None
    numbers = _numbers(weight, type)
    if int(numbers.min()) < lowest or int(numbers.max()) > highest:
        return f"{type.name} holds whole numbers from {lowest} to {highest}, of which its own are some no"
    return None


def to_blocks(weight: QTensor, type: T) -> Tensor:
    """A weight's blocks, uint8 [out_features, bytes of a row].

    Args:
        weight: One that :func:`misfit` has nothing to say of.
        type: One of :data:`GRIDS`.
    """
    count = len(weight.codes)
    if type is T.MXFP4:
        exponents = weight.scales.view(torch.uint8).repeat_interleave(_blocks_a_group(weight), 1)
        return torch.cat([exponents.unsqueeze(-1), _halved(weight.codes)], -1).view(count, -1)
    if type is T.NVFP4:
        halved = _halved(weight.codes, _SIXTEEN).view(count, -1, _FOUR * _SIXTEEN // 2)
        return torch.cat([weight.scales.view(torch.uint8).view(count, -1, _FOUR), halved], -1).view(count, -1)
    pieces = [_in_blocks(torch.where(_turned(weight, type), -weight.scales, weight.scales), weight)]
    if type is T.Q4_1:
        pieces += [_in_blocks(_bases(weight), weight), _halved(weight.codes)]
    elif type is T.Q4_0:
        pieces.append(_halved((_numbers(weight, type) + 8).to(torch.uint8)))
    else:
        pieces.append(_numbers(weight, type).to(torch.int8).view(torch.uint8).view(count, -1, BLOCK))
    return torch.cat(pieces, -1).view(count, -1)


def _nvfp4_misfit(weight: QTensor) -> str | None:
    """See :func:`misfit`; the global scale becomes a float32."""
    grid, columns = weight.grid, weight.shape[1]
    if grid.scale_dtype is not torch.float8_e4m3fn or grid.width(columns) != _SIXTEEN:
        return "NVFP4 has a scale in E4M3 for each 16 inputs"
    if columns % (_FOUR * _SIXTEEN):
        return f"blocks of {_FOUR * _SIXTEEN} do not divide its {columns} input features"
    if bool((weight.scales.view(torch.uint8) >= _NO_SCALE).any()):
        return "NVFP4 has scales that are not negative"
    rounded = replace(weight, global_scale=float(torch.tensor(weight.global_scale, dtype=torch.float32)))
    if not torch.equal(rounded.steps(), weight.steps()):
        return "its scales times a global scale in float32 are other numbers"
    return None


def _blocks_a_group(weight: QTensor) -> int:
    return weight.shape[1] // weight.scales.shape[1] // BLOCK


def _in_blocks(values: Tensor, weight: QTensor) -> Tensor:
    """Numbers of groups as the float16 bytes of their blocks: [rows, groups] -> uint8 [rows, blocks, 2]."""
    return values.to(torch.float16).repeat_interleave(_blocks_a_group(weight), 1).unsqueeze(-1).view(torch.uint8)


def _bases(weight: QTensor) -> Tensor:
    """What a code of 0 stands for, float64 of the scales' shape."""
    zeros: Tensor | int = weight.grid.mid if weight.zero_points is None else weight.zero_points.double()
    return -(zeros * weight.scales.double())


def _numbers(weight: QTensor, type: T) -> Tensor:
    """Codes less their zero points, int16 [out_features, in_features]; negated where the scale is negative."""
    zeros: Tensor | int = weight.grid.mid
    if weight.zero_points is None:
        return weight.codes.short() - zeros
    width = weight.shape[1] // weight.scales.shape[1]
    zeros = weight.zero_points.short().repeat_interleave(width, 1)
    turned = _turned(weight, type).repeat_interleave(width, 1)
    numbers = weight.codes.short() - zeros
    return torch.where(turned, -numbers, numbers)


def _turned(weight: QTensor, type: T) -> Tensor:
    """Which scales become negative, bool of their shape: of Q4_0 those whose numbers reach from -7 to 8."""
    if type is not T.Q4_0 or weight.zero_points is None or weight.grid.bits != 4:
        return torch.zeros_like(weight.scales, dtype=torch.bool)
    return weight.zero_points == 7


def _halves(pairs: Tensor) -> Tensor:
    """uint8 [rows, blocks, 2] -> float16 [rows, blocks]."""
    return pairs.contiguous().view(torch.float16).squeeze(-1)


def _pairs(packed: Tensor) -> Tensor:
    """The lower halves of a run of bytes, then the upper: uint8 [rows, runs, bytes] -> codes, uint8 [rows, codes]."""
    return torch.cat([packed & 15, packed >> 4], -1).flatten(1)


def _halved(codes: Tensor, size: int = BLOCK) -> Tensor:
    """The inverse of :func:`_pairs`, of runs of so many codes."""
    blocks = codes.view(len(codes), -1, 2, size // 2)
    return blocks[:, :, 0] | (blocks[:, :, 1] << 4)
