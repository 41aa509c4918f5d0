"""IQ2 and IQ3: what each can hold, and where its parts stand in a block.

Every function packs what a search found as uint8 [blocks, block_bytes]. Its docstring names the parts of a block in the
order of their bytes; multi-byte numbers are little-endian.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qconv.grids.ggml import signed
from qconv.grids.ggml.block_types import GgmlType
from qconv.grids.ggml.packing import half_bytes, little_endian
from qconv.grids.ggml.signed import SIGNS, SignedGrid

# Where the searches begin was chosen greedily, as in qconv.grids.ggml.searched.
IQ3_S = SignedGrid(GgmlType.IQ3_S, 1.0, False, (1.05, 0.9, 1.2, 0.75), (0.8,), (1.0, 1.45, 1.3))
IQ3_XXS = SignedGrid(GgmlType.IQ3_XXS, 1 / 4, True, (1.05, 1.2, 0.9, 0.75), (0.8,), (1.0, 1.45, 1.3))
IQ2_S = SignedGrid(GgmlType.IQ2_S, 1 / 8, False, (1.1, 1.3, 0.9), (1.0, 1.3), (1.6,))
IQ2_XS = SignedGrid(GgmlType.IQ2_XS, 1 / 8, True, (1.1, 1.45, 0.85), (1.0, 0.7, 1.3), ())
IQ2_XXS = SignedGrid(GgmlType.IQ2_XXS, 1 / 8, True, (1.3, 1.1, 1.6), (0.9, 1.2, 0.6), ())


def iq2_xxs(found: signed.Encoded) -> Tensor:
    """d; for each sub-block four codes of a byte, then a word: seven signs of each four times, and k on top."""
    codes = _by_block(found.codes).to(torch.uint8)
    parts = [codes.view(len(codes), -1, 4), _signs_and_scale(found)]
    return torch.cat([half_bytes(found.d), torch.cat(parts, dim=2).flatten(1)], dim=1)


def iq2_xs(found: signed.Encoded) -> Tensor:
    """d; for each eight weights a code of nine bits and seven signs above it; k."""
    words = _by_block(found.codes) | (_sign_bytes(found.negative) & 127) << 9
    return torch.cat([half_bytes(found.d), little_endian(words, 2), _nibbles(found.k)], dim=1)


def iq2_s(found: signed.Encoded) -> Tensor:
    """d; the low eight bits of each code; signs; the codes' upper two bits; k."""
    codes = _by_block(found.codes)
    signs = _sign_bytes(found.negative).to(torch.uint8)
    parts = [half_bytes(found.d), little_endian(codes, 1), signs, _joined(codes >> 8, 2), _nibbles(found.k)]
    return torch.cat(parts, dim=1)


def iq3_xxs(found: signed.Encoded) -> Tensor:
    """d; codes; for each sub-block a word: seven signs of each eight weights, and k on top."""
    return torch.cat(
        [half_bytes(found.d), little_endian(_by_block(found.codes), 1), _signs_and_scale(found).flatten(1)], dim=1
    )


def iq3_s(found: signed.Encoded) -> Tensor:
    """d; the low eight bits of each code; their ninth bits; signs; k."""
    codes = _by_block(found.codes)
    signs = _sign_bytes(found.negative).to(torch.uint8)
    parts = [half_bytes(found.d), little_endian(codes, 1), _joined(codes >> 8, 1), signs, _nibbles(found.k)]
    return torch.cat(parts, dim=1)


def _by_block(parts: Tensor) -> Tensor:
    """[parts, sub-blocks, blocks] -> [blocks, sub-blocks * parts], the order of a file."""
    return parts.permute(2, 1, 0).flatten(1)


def _sign_bytes(negative: Tensor) -> Tensor:
    """Bit i of a byte is the sign of weight i of eight: bool [elements, sub-blocks, blocks] -> int64 [blocks, 32]."""
    eights = negative.view(-1, SIGNS, *negative.shape[1:])
    bits = [eights[:, place].long() << place for place in range(SIGNS)]
    return _by_block(torch.stack(bits).sum(0))


def _signs_and_scale(found: signed.Encoded) -> Tensor:
    """The word of each sub-block of 32: uint8 [blocks, sub-blocks, 4]."""
    seven = _sign_bytes(found.negative).view(len(found.d), -1, 4) & 127
    words = found.k.t().long() << 28
    for place in range(4):
        words = words | seven[..., place] << 7 * place
    return little_endian(words, 4).view(*words.shape, 4)


def _nibbles(k: Tensor) -> Tensor:
    """Two sub-blocks' k in a byte, the first in the low bits: float32 [sub-blocks, blocks] -> uint8."""
    return _joined(k.t().long(), 4)


def _joined(fields: Tensor, bits: int) -> Tensor:
    """Neighbours in one byte, the first in the lowest bits: int64 [blocks, fields] -> uint8 [blocks, bytes]."""
    groups = fields.reshape(len(fields), -1, 8 // bits)
    shifts = torch.arange(0, 8, bits, device=fields.device)
    return (groups << shifts).sum(2).to(torch.uint8)
