"""IQ1: what each type can hold, and where its parts stand in a block.

Every function packs what a search found as uint8 [blocks, block_bytes]. Its docstring names the parts of a block in the
order of their bytes; multi-byte numbers are little-endian.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qconv.grids.ggml import shifted
from qconv.grids.ggml.block_types import GgmlType
from qconv.grids.ggml.packing import half_bytes, little_endian
from qconv.grids.ggml.shifted import ShiftedGrid

IQ1_S = ShiftedGrid(GgmlType.IQ1_S, 32, (1.0, 1.3, 1.7))
IQ1_M = ShiftedGrid(GgmlType.IQ1_M, 8, (1.0, 1.3, 1.7))


def iq1_s(found: shifted.Encoded) -> Tensor:
    """d; the low eight bits of each code; of a sub-block a word: three bits more of four codes, k, the shift's sign."""
    codes = found.codes.permute(2, 1, 0)  # [blocks, sub-blocks, groups]
    words = found.k.t().long() << 12 | found.negative[0].t().long() << 15
    for place in range(4):
        words = words | (codes[..., place] >> 8) << 3 * place
    return torch.cat([half_bytes(found.d), little_endian(codes, 1), little_endian(words, 2)], dim=1)


def iq1_m(found: shifted.Encoded) -> Tensor:
    """The low eight bits of each code; in nibbles three bits more and a shift's sign; in words four k and bits of d."""
    codes, negative = (part.permute(2, 1, 0) for part in (found.codes, found.negative))
    upper = codes >> 8 | negative.long() << 3
    nibbles = (upper[..., 0] | upper[..., 1] << 4).to(torch.uint8)
    k, d = found.k.t().long().view(-1, 4, 4), half_bytes(found.d).view(torch.int16).long()
    words = (d >> torch.arange(0, 16, 4, device=d.device) & 15) << 12
    for place in range(4):
        words = words | k[..., place] << 3 * place
    return torch.cat([little_endian(codes, 1), nibbles, little_endian(words, 2)], dim=1)
