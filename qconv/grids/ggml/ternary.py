"""TQ1_0 and TQ2_0: every weight of a block of 256 is 0 or one magnitude with a sign, as ternary models have them.

A block's scale d is float16, its codes are ``round(x / d) + 1``. TQ2_0 keeps four codes in a byte. TQ1_0 keeps five as
the digits of a number in base three, the first the most significant, of which it stores ``ceil(256 n / 243)``: times
three, the bits above the eighth are the first digit, those below are the rest (ggml-quants.c). By formula d is the
largest magnitude, which suits weights that are ternary already; the search that importance asks for takes the
least-squares d.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qconv.grids.ggml.numeric import reciprocal
from qconv.grids.ggml.packing import by_block, half_bytes
from qconv.grids.ggml.scaled import Encoded, ScaledGrid
from qconv.grids.nearest import Integers

# Most weights of a bell lie far below the largest of 256, so a code of 1 stands for half of it or less.
TERNARY = ScaledGrid(Integers(-1.0, 1.0), top=None, reaches=(1.0, 2.0, 1.5, 3.0))

_BELOW_HALF = 0.49999997  # the float32 before 0.5
_DIGITS = 5
_RUNS = ((0, 160), (160, 240), (240, 256))
"""Elements whose codes share bytes in TQ1_0: the first of each fifth of a run (each fourth of the last), and so on."""


def tq1_0(blocks: Tensor) -> Tensor:
    """By formula: float32 [blocks, 256] -> codes and d, uint8 [blocks, 54]."""
    codes, scale = _formula(blocks)
    return torch.cat([_base_three(codes), half_bytes(scale)], dim=1)


def tq2_0(blocks: Tensor) -> Tensor:
    """By formula: float32 [blocks, 256] -> codes and d, uint8 [blocks, 66]."""
    codes, scale = _formula(blocks)
    return torch.cat([_two_bits(codes), half_bytes(scale)], dim=1)


def pack_tq1_0(found: Encoded) -> Tensor:
    """Codes; d."""
    codes, scale = _found(found)
    return torch.cat([_base_three(codes), half_bytes(scale)], dim=1)


def pack_tq2_0(found: Encoded) -> Tensor:
    """Codes; d."""
    codes, scale = _found(found)
    return torch.cat([_two_bits(codes), half_bytes(scale)], dim=1)


def _formula(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, uint8 [blocks, 256], and the largest magnitudes, float32 [blocks]."""
    scale = blocks.abs().amax(1)
    codes = blocks * reciprocal(scale).unsqueeze(1)
    # Halves away from zero, as C's lroundf: see qconv.grids.ggml.direct.
    codes.add_(torch.copysign(torch.tensor(_BELOW_HALF, device=blocks.device), codes))
    return codes.to(torch.int8).add_(1).view(torch.uint8), scale


def _found(found: Encoded) -> tuple[Tensor, Tensor]:
    """The same of what a search found; no scale is negative, since codes can be."""
    scale = found.scales[0]
    values = torch.where(scale < 0.0, -found.values, found.values)
    return by_block(values.to(torch.int8).add_(1).view(torch.uint8)), scale.abs()


def _base_three(codes: Tensor) -> Tensor:
    """uint8 [blocks, 256] -> [blocks, 52]."""
    powers = 3 ** torch.arange(_DIGITS - 1, -1, -1, dtype=torch.int32, device=codes.device)
    parts = []
    for (first, last), digits in zip(_RUNS, (_DIGITS, _DIGITS, _DIGITS - 1), strict=True):
        run = codes[:, first:last].reshape(len(codes), digits, -1).int()
        parts.append((run * powers[:digits].unsqueeze(1)).sum(1, dtype=torch.int32))
    numbers = torch.cat(parts, dim=1)
    return ((numbers * 256 + 242) // 243).to(torch.uint8)


def _two_bits(codes: Tensor) -> Tensor:
    """Elements i, i + 32, i + 64 and i + 96 of each 128 in one byte: uint8 [blocks, 256] -> [blocks, 64]."""
    first, second, third, fourth = codes.view(len(codes), 2, 4, 32).unbind(2)
    return (first | second << 2 | third << 4 | fourth << 6).flatten(1)
