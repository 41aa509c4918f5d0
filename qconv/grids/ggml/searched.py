"""The types whose encoder searches: what each can hold, and where its parts stand in a block.

Every function packs what a search found, the number of blocks being a multiple of eight, as uint8 [blocks,
block_bytes]. Its docstring names the parts of a block in the order of their bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from qconv.grids.ggml import affine, codebook, scaled, shifted, shifted_types, signed, signed_types, ternary
from qconv.grids.ggml.affine import AffineGrid
from qconv.grids.ggml.block_types import GgmlType
from qconv.grids.ggml.packing import (
    bit_fields,
    fifth_bits,
    half_bytes,
    six_bit_pairs,
    six_bit_scales,
    split_halves,
    to_bytes,
)
from qconv.grids.ggml.scaled import ScaledGrid
from qconv.grids.ggml.shifted import ShiftedGrid
from qconv.grids.ggml.signed import SignedGrid
from qconv.grids.nearest import Integers

GridT = TypeVar("GridT", AffineGrid, ScaledGrid, SignedGrid, ShiftedGrid)
FoundT = TypeVar("FoundT", affine.Encoded, scaled.Encoded, signed.Encoded, shifted.Encoded)


@dataclass(frozen=True, slots=True)
class Search(Generic[GridT, FoundT]):
    """How a type is searched.

    Attributes:
        subblocks: Of a block.
        grid: What it can hold.
        find: Searches float32 [elements, sub-blocks, blocks] (overwritten), with importance of the same shape or None.
        pack: Gives what was found as bytes.
        lanes: It works on multiples of so many blocks.
    """

    subblocks: int
    grid: GridT
    find: Callable[[Tensor, Tensor | None, GridT], FoundT]
    pack: Callable[[FoundT], Tensor]
    lanes: int = (
        64  # torch.sum over the first dimension adds in an order of its own unless four vectors divide the rest
    )

    def encode(self, weights: Tensor, importance: Tensor | None) -> Tensor:
        """The bytes of what the search finds, uint8 [blocks, block_bytes]."""
        return self.pack(self.find(weights, importance, self.grid))


# Where the searches begin was chosen greedily, on normal and heavy-tailed weights and on trained experts: of many
# starts each time the one by which the best of all those chosen improves most.
_SPANS = (-0.7, 0.5, -2.5, 1.5)
Q4_1 = AffineGrid(levels=15, top=None, spans=_SPANS)
Q5_1 = AffineGrid(levels=31, top=None, spans=_SPANS)
Q2_K = AffineGrid(levels=3, top=15, spans=(0.4, 0.9, -0.5, 2.2))
Q4_K = AffineGrid(levels=15, top=63, spans=_SPANS)
Q5_K = AffineGrid(levels=31, top=63, spans=_SPANS)

_CODEBOOK_REACHES = (
    *(-129.0, 115.0, -108.0, -137.0, -122.0, 122.0, 108.0, -143.0),
    *(125.0, -151.0, 151.0, -91.0, 132.0, -163.0, 91.0, -175.0),
)
IQ4_NL = ScaledGrid(codebook.nearest, top=None, reaches=_CODEBOOK_REACHES)
IQ4_XS = ScaledGrid(codebook.nearest, top=32, reaches=_CODEBOOK_REACHES)
Q4_0 = ScaledGrid(Integers(-8.0, 7.0), top=None, reaches=(-8.2, -9.6, -7.2, -11.0, 9.3, -6.0, -8.8, -12.0))
Q5_0 = ScaledGrid(Integers(-16.0, 15.0), top=None, reaches=(-16.2, -15.0, -17.6, -14.0, -19.0, -13.0, -16.8, -20.0))
Q3_K = ScaledGrid(Integers(-4.0, 3.0), top=32, reaches=(-4.2, -3.2, -4.8, -3.8, 3.8, -6.0, 5.2, -8.0))
Q6_K = ScaledGrid(Integers(-32.0, 31.0), top=128, reaches=(-32.0, -31.0, -30.0, -29.0, -33.3, -34.5, -32.5, -36.0))


def q4_0(found: scaled.Encoded) -> Tensor:
    """d; codes."""
    return torch.cat([half_bytes(found.scales[0]), _nibbles(to_bytes(found.values + 8.0))], dim=1)


def q5_0(found: scaled.Encoded) -> Tensor:
    """d; fifth bits; codes."""
    codes = to_bytes(found.values + 16.0)
    return torch.cat([half_bytes(found.scales[0]), fifth_bits(codes), _nibbles(codes)], dim=1)


def q4_1(found: affine.Encoded) -> Tensor:
    """d and base; codes."""
    return torch.cat([half_bytes(found.scales[0]), half_bytes(found.bases[0]), _nibbles(to_bytes(found.codes))], dim=1)


def q5_1(found: affine.Encoded) -> Tensor:
    """d and base; fifth bits; codes."""
    codes = to_bytes(found.codes)
    return torch.cat(
        [half_bytes(found.scales[0]), half_bytes(found.bases[0]), fifth_bits(codes), _nibbles(codes)], dim=1
    )


def iq4_nl(found: scaled.Encoded) -> Tensor:
    """d; codes."""
    return torch.cat([half_bytes(found.scales[0]), _nibbles(codebook.codes(found.values))], dim=1)


def iq4_xs(found: scaled.Encoded) -> Tensor:
    """d; upper two bits of the scales, lower four; codes."""
    scales = to_bytes(found.scales + 32.0).unsqueeze(0)
    return torch.cat(
        [
            half_bytes(found.d),
            bit_fields(scales, 2, shift=4),
            bit_fields(scales, 4),
            _nibbles(codebook.codes(found.values)),
        ],
        dim=1,
    )


def q2_k(found: affine.Encoded) -> Tensor:
    """Four bits each of scale and min; codes; d and dmin."""
    scales = to_bytes(found.scales) | (to_bytes(found.bases) << 4)
    return torch.cat(
        [
            scales.t(),
            bit_fields(to_bytes(found.codes), 2, stride=2),
            half_bytes(found.d),
            half_bytes(found.dmin),
        ],
        dim=1,
    )


def q3_k(found: scaled.Encoded) -> Tensor:
    """Third bits of the codes, lower two; scales; d."""
    codes = to_bytes(found.values + 4.0)
    return torch.cat(
        [
            bit_fields(codes, 1, stride=2, shift=2),
            bit_fields(codes, 2, stride=2),
            six_bit_scales(to_bytes(found.scales + 32.0)),
            half_bytes(found.d),
        ],
        dim=1,
    )


def q4_k(found: affine.Encoded) -> Tensor:
    """d and dmin; scales and mins; codes."""
    return torch.cat([*_affine_head(found), bit_fields(to_bytes(found.codes), 4)], dim=1)


def q5_k(found: affine.Encoded) -> Tensor:
    """d and dmin; scales and mins; fifth bits; codes."""
    codes = to_bytes(found.codes)
    return torch.cat([*_affine_head(found), bit_fields(codes, 1, shift=4), bit_fields(codes, 4)], dim=1)


def q6_k(found: scaled.Encoded) -> Tensor:
    """Lower four bits of the codes, upper two; scales; d."""
    codes = to_bytes(found.values + 32.0)
    return torch.cat(
        [
            bit_fields(codes, 4, stride=4),
            bit_fields(codes, 2, stride=2, shift=4),
            found.scales.to(torch.int8).view(torch.uint8).t(),
            half_bytes(found.d),
        ],
        dim=1,
    )


def _affine_head(found: affine.Encoded) -> list[Tensor]:
    """The first 16 bytes of Q4_K and Q5_K."""
    pairs = six_bit_pairs(to_bytes(found.scales), to_bytes(found.bases))
    return [half_bytes(found.d), half_bytes(found.dmin), pairs]


def _nibbles(codes: Tensor) -> Tensor:
    """Elements i and i + 16 of a sub-block of 32 in one byte: uint8 [32, sub-blocks, blocks] -> [blocks, bytes]."""
    return bit_fields(split_halves(codes), 4)


SEARCHES: dict[GgmlType, Search[Any, Any]] = {
    GgmlType.Q4_0: Search(1, Q4_0, scaled.encode, q4_0),
    GgmlType.Q4_1: Search(1, Q4_1, affine.encode, q4_1),
    GgmlType.Q5_0: Search(1, Q5_0, scaled.encode, q5_0),
    GgmlType.Q5_1: Search(1, Q5_1, affine.encode, q5_1),
    GgmlType.IQ4_NL: Search(1, IQ4_NL, scaled.encode, iq4_nl),
    GgmlType.IQ4_XS: Search(8, IQ4_XS, scaled.encode, iq4_xs),
    GgmlType.IQ1_S: Search(8, shifted_types.IQ1_S, shifted.encode, shifted_types.iq1_s, lanes=1),
    GgmlType.IQ1_M: Search(16, shifted_types.IQ1_M, shifted.encode, shifted_types.iq1_m, lanes=1),
    GgmlType.IQ2_XXS: Search(8, signed_types.IQ2_XXS, signed.encode, signed_types.iq2_xxs, lanes=1),
    GgmlType.IQ2_XS: Search(16, signed_types.IQ2_XS, signed.encode, signed_types.iq2_xs, lanes=1),
    GgmlType.IQ2_S: Search(16, signed_types.IQ2_S, signed.encode, signed_types.iq2_s, lanes=1),
    GgmlType.IQ3_XXS: Search(8, signed_types.IQ3_XXS, signed.encode, signed_types.iq3_xxs, lanes=1),
    GgmlType.IQ3_S: Search(8, signed_types.IQ3_S, signed.encode, signed_types.iq3_s, lanes=1),
    GgmlType.TQ1_0: Search(1, ternary.TERNARY, scaled.encode, ternary.pack_tq1_0),
    GgmlType.TQ2_0: Search(1, ternary.TERNARY, scaled.encode, ternary.pack_tq2_0),
    GgmlType.Q2_K: Search(16, Q2_K, affine.encode, q2_k),
    GgmlType.Q3_K: Search(16, Q3_K, scaled.encode, q3_k),
    GgmlType.Q4_K: Search(8, Q4_K, affine.encode, q4_k),
    GgmlType.Q5_K: Search(8, Q5_K, affine.encode, q5_k),
    GgmlType.Q6_K: Search(16, Q6_K, scaled.encode, q6_k),
}
