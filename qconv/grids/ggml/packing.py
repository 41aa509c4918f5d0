"""From codes to the bytes of ggml's blocks.

Codes come as uint8 [elements, sub-blocks, blocks], the layout of the searches: the blocks stand last, so that every
operation runs over long contiguous rows. They are packed in that layout, where fewer bytes are left to be transposed,
and eight at a time as one int64: the number of blocks is a multiple of eight.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EVERY_BYTE = 0x0101010101010101


def by_element(blocks: Tensor, subblocks: int, padding: int = 0) -> Tensor:
    """[blocks, block_elements] -> float32 [elements, sub-blocks, blocks + padding], contiguous and a copy."""
    grouped = blocks.view(len(blocks), subblocks, -1).permute(2, 1, 0)
    elements, _, count = grouped.shape
    arranged = torch.empty(elements, subblocks, count + padding, device=blocks.device)
    arranged[..., :count] = grouped
    arranged[..., count:] = 0.0
    return arranged


def by_block(codes: Tensor) -> Tensor:
    """uint8 [elements, sub-blocks, blocks] -> [blocks, sub-blocks * elements], the order of a file."""
    return codes.permute(2, 1, 0).reshape(codes.shape[2], -1)


def half_bytes(values: Tensor) -> Tensor:
    """float32 [blocks] that are float16 numbers -> their bytes, uint8 [blocks, 2]."""
    return values.to(torch.float16).unsqueeze(-1).view(torch.uint8)


def little_endian(words: Tensor, count: int) -> Tensor:
    """The ``count`` low bytes of each word: int64 [blocks, ...] -> uint8 [blocks, bytes]."""
    return words.contiguous().view(torch.uint8).view(*words.shape, 8)[..., :count].flatten(1)


def to_bytes(codes: Tensor) -> Tensor:
    """float32 codes from 0 to 127 -> uint8. By way of int8, since torch converts to that several times faster."""
    return codes.to(torch.int8).view(torch.uint8)


def bit_fields(codes: Tensor, bits: int, stride: int = 1, shift: int = 0) -> Tensor:
    """Join ``bits`` bits of sub-blocks ``stride`` apart to whole bytes, the first in the lowest bits.

    Each run of ``8 / bits * stride`` sub-blocks becomes ``stride``: byte ``i`` of the run holds the codes of sub-blocks
    ``i``, ``i + stride``, ``i + 2 stride`` ...

    Args:
        codes: uint8 [elements, sub-blocks, blocks].
        bits: 1, 2 or 4, taken of each code from bit ``shift`` upward.
        stride: Distance of the sub-blocks that share a byte.
        shift: The lowest bit taken.

    Returns:
        uint8 [blocks, sub-blocks * bits / 8 * elements], in the order of a file.
    """
    elements, subblocks, blocks = codes.shape
    words = codes.view(torch.int64)  # shifts cross bytes, but what crosses is masked
    fields = ((words >> shift) & (_EVERY_BYTE * ((1 << bits) - 1))).view(elements, -1, 8 // bits, stride, blocks // 8)
    joined = fields[:, :, 0].clone()
    for place in range(1, 8 // bits):
        joined |= fields[:, :, place] << (place * bits)
    return by_block(joined.view(elements, subblocks * bits // 8, -1).view(torch.uint8))


def split_halves(codes: Tensor) -> Tensor:
    """Each sub-block of 32 as two of 16: uint8 [32, sub-blocks, blocks] -> [16, 2 * sub-blocks, blocks].

    The types with blocks of 32 and IQ4_XS keep elements ``i`` and ``i + 16`` in one byte.
    """
    _, subblocks, blocks = codes.shape
    words = codes.view(torch.int64).view(2, 16, subblocks, blocks // 8)
    return words.permute(1, 2, 0, 3).reshape(16, 2 * subblocks, -1).view(torch.uint8)


def fifth_bits(codes: Tensor) -> Tensor:
    """Bit 4 of each code of a block of 32 as a little-endian word: uint8 [32, 1, blocks] -> [blocks, 4]."""
    return bit_fields(codes.view(1, 32, -1), 1, shift=4)


def six_bit_pairs(scales: Tensor, mins: Tensor) -> Tensor:
    """The 12 bytes of 8 scales and 8 mins of six bits in Q4_K and Q5_K.

    Bytes 0-3 hold scales 0-3 in their low six bits, bytes 4-7 mins 0-3, bytes 8-11 the low four bits of scale and min
    4-7; the upper two bits of those are the top bits of bytes 0-3 (scales) and 4-7 (mins).

    Args:
        scales: uint8 [8, blocks].
        mins: uint8 [8, blocks].

    Returns:
        uint8 [blocks, 12].
    """
    first = scales[:4] | ((scales[4:] >> 4) << 6)
    second = mins[:4] | ((mins[4:] >> 4) << 6)
    third = (scales[4:] & 15) | ((mins[4:] & 15) << 4)
    return torch.cat([first, second, third]).t()


def six_bit_scales(scales: Tensor) -> Tensor:
    """The 12 bytes of 16 scales of six bits in Q3_K: uint8 [16, blocks] -> [blocks, 12].

    Byte i < 8 holds the low four bits of scales i and i + 8; byte 8 + i the upper two of scales i, i + 4, i + 8 and
    i + 12.
    """
    grouped = scales.unsqueeze(0)
    return torch.cat([bit_fields(grouped, 4, stride=8), bit_fields(grouped, 2, stride=4, shift=4)], dim=1)
