"""Where the scales stand in ggml's blocks: the inverse of what the packers write, without the codes.

The offsets are those of the structures in ggml's ``ggml-common.h``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qconv.grids.ggml.block_types import GgmlType


@dataclass(frozen=True, slots=True)
class BlockScales:
    """The numbers that scale a type's codes, float32.

    Attributes:
        d: [blocks]; 1 where each block has a scale of its own.
        multiples: [sub-blocks, blocks], what d is multiplied by: integers, odd numbers for lattices, or scales.
        dmin: [blocks], or None for types without bases; 1 where each block has a base of its own.
        lows: [sub-blocks, blocks]: integers that dmin is multiplied by, the negative of bases; or bases.
    """

    d: Tensor
    multiples: Tensor
    dmin: Tensor | None = None
    lows: Tensor | None = None


def read_scales(data: Tensor, type: GgmlType) -> BlockScales:
    """The scales of encoded blocks, uint8 [blocks, block_bytes].

    Raises:
        KeyError: a type of plain floats.
    """
    return _READERS[type](data)


def _half(data: Tensor, offset: int) -> Tensor:
    """[blocks]."""
    return data[:, offset : offset + 2].contiguous().view(torch.float16).flatten().float()


def _nibbles(data: Tensor) -> Tensor:
    """Low and high halves of each byte, the low one first: uint8 [blocks, bytes] -> float32 [2 * bytes, blocks]."""
    return torch.stack([data & 15, data >> 4], 2).flatten(1).t().float()


def _own_at(offset: int) -> Callable[[Tensor], BlockScales]:
    def read(data: Tensor) -> BlockScales:
        scale = _half(data, offset)
        return BlockScales(torch.ones_like(scale), scale.unsqueeze(0))

    return read


def _own_affine(data: Tensor) -> BlockScales:
    scale, base = _half(data, 0), _half(data, 2)
    one = torch.ones_like(scale)
    return BlockScales(one, scale.unsqueeze(0), one, base.unsqueeze(0))


def _exponents(data: Tensor) -> BlockScales:
    """MXFP4's, for magnitudes that are doubled: half of 2 ** (e - 127)."""
    scale = torch.exp2(data[:, 0].double() - 128.0).float()
    return BlockScales(torch.ones_like(scale), scale.unsqueeze(0))


def _q2_k(data: Tensor) -> BlockScales:
    scales = data[:, :16].t()
    return BlockScales(_half(data, 80), (scales & 15).float(), _half(data, 82), (scales >> 4).float())


def _q3_k(data: Tensor) -> BlockScales:
    packed = data[:, 96:108].t()
    low = torch.cat([packed[:8] & 15, packed[:8] >> 4])
    high = torch.cat([packed[8:] >> shift & 3 for shift in (0, 2, 4, 6)])
    return BlockScales(_half(data, 108), (low | high << 4).float() - 32.0)


def _six_bits(data: Tensor) -> BlockScales:
    """Q4_K and Q5_K."""
    packed = data[:, 4:16].t()
    first, second, third = packed[:4], packed[4:8], packed[8:]
    scales = torch.cat([first & 63, third & 15 | (first >> 6) << 4])
    lows = torch.cat([second & 63, third >> 4 | (second >> 6) << 4])
    return BlockScales(_half(data, 0), scales.float(), _half(data, 2), lows.float())


def _q6_k(data: Tensor) -> BlockScales:
    return BlockScales(_half(data, 208), data[:, 192:208].contiguous().view(torch.int8).t().float())


def _iq4_xs(data: Tensor) -> BlockScales:
    low = _nibbles(data[:, 4:8])
    high = torch.stack([data[:, 2:4] >> shift & 3 for shift in (0, 2, 4, 6)], 2).flatten(1).t().float()
    return BlockScales(_half(data, 0), low + 16.0 * high - 32.0)


def _odd_nibbles(offset: int) -> Callable[[Tensor], BlockScales]:
    def read(data: Tensor) -> BlockScales:
        return BlockScales(_half(data, 0), 2.0 * _nibbles(data[:, offset:]) + 1.0)

    return read


def _odd_words(offset: int, stride: int) -> Callable[[Tensor], BlockScales]:
    """The top four bits of a word for each sub-block of 32."""

    def read(data: Tensor) -> BlockScales:
        tops = data[:, offset + 3 :: stride][:, :8].t() >> 4
        return BlockScales(_half(data, 0), 2.0 * tops.float() + 1.0)

    return read


def _iq1_s(data: Tensor) -> BlockScales:
    return BlockScales(_half(data, 0), 2.0 * (_words(data[:, 34:]) >> 12 & 7).float() + 1.0)


def _iq1_m(data: Tensor) -> BlockScales:
    words = _words(data[:, 48:])
    k = torch.stack([words >> shift & 7 for shift in (0, 3, 6, 9)], 1).flatten(0, 1).float()
    bits = (words >> 12 << torch.arange(0, 16, 4, device=data.device).unsqueeze(1)).sum(0)
    return BlockScales(bits.to(torch.uint16).view(torch.float16).float(), 2.0 * k + 1.0)


def _words(data: Tensor) -> Tensor:
    """Little-endian numbers of 16 bits: uint8 [blocks, bytes] -> int64 [words, blocks]."""
    return data[:, ::2].t().long() | data[:, 1::2].t().long() << 8


def read_shifts(data: Tensor, type: GgmlType) -> Tensor | None:
    """The shifts of IQ1_S's sub-blocks: uint8 [blocks, block_bytes] -> float32 [sub-blocks, blocks].

    None for a type whose sub-blocks have no shift of their own.
    """
    return 0.125 - 0.25 * (_words(data[:, 34:]) >> 15).float() if type is GgmlType.IQ1_S else None


_READERS: dict[GgmlType, Callable[[Tensor], BlockScales]] = {
    GgmlType.Q8_0: _own_at(0),
    GgmlType.Q4_0: _own_at(0),
    GgmlType.Q5_0: _own_at(0),
    GgmlType.IQ4_NL: _own_at(0),
    GgmlType.TQ1_0: _own_at(52),
    GgmlType.TQ2_0: _own_at(64),
    GgmlType.Q4_1: _own_affine,
    GgmlType.Q5_1: _own_affine,
    GgmlType.MXFP4: _exponents,
    GgmlType.Q2_K: _q2_k,
    GgmlType.Q3_K: _q3_k,
    GgmlType.Q4_K: _six_bits,
    GgmlType.Q5_K: _six_bits,
    GgmlType.Q6_K: _q6_k,
    GgmlType.IQ4_XS: _iq4_xs,
    GgmlType.IQ1_S: _iq1_s,
    GgmlType.IQ1_M: _iq1_m,
    GgmlType.IQ2_XXS: _odd_words(6, 8),
    GgmlType.IQ2_XS: _odd_nibbles(66),
    GgmlType.IQ2_S: _odd_nibbles(74),
    GgmlType.IQ3_XXS: _odd_words(66, 4),
    GgmlType.IQ3_S: _odd_nibbles(106),
}
