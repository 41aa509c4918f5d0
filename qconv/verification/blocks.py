"""Of ggml's types: the least credible distance from the source, and where a block holds the numbers that scale it.

A block whose scale is a NaN or an infinity makes every value of it one, and with it what a model computes. The offsets
are those of the structures in ggml's ``ggml-common.h``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from qconv.verification.floors import matched_floor_db, snr_floor_db
from qconv.verification.rows import USUAL, Least

_FLOAT_FLOORS = {"F32": math.inf, "F16": 60.0, "BF16": 45.0, "MXFP4": 10.0, "NVFP4": 10.0}
"""Signal to noise of 11 and 8 significant bits is about 73 and 55 dB, that of E2M1 with a power of two for scale 16."""

_WEIGHTED_FP4_FLOOR = 4.0
"""Compensated: twelve below what rounding has, as of integers (:func:`qconv.verification.floors.snr_floor_db`)."""

_LATTICE_FLOORS = {
    **{"IQ3_S": 8.0, "IQ3_XXS": 7.0, "IQ2_S": 3.5, "IQ2_XS": 3.5, "IQ2_XXS": 2.0},
    **{"IQ1_M": 5.0, "IQ1_S": 4.0},
}
"""Without importance. Gaussian weights have 17.8, 15.0, 12.4, 10.9, 9.6, 7.7 and 7.0 dB. The worst that a search came
to, on weights from a Cauchy distribution or three of a hundred not zero, is about one above these: no level is zero, so
what is small beside its neighbours gets an error of its own size, or an eighth of theirs in IQ1."""

_WEIGHTED_LATTICE_FLOOR = -1.0
"""With importance, trained weights lose up to four dB. But a few outliers can hold most of the signal, and if they
matter to no output they may become the lowest level, even with the wrong sign. A wrong tensor has -3 dB."""

_TERNARY_FLOORS = (0.0, -2.0)
"""Of TQ1_0 and TQ2_0, without and with importance or compensation. Rounding to 0 or one magnitude moves no weight
by more than itself, and the largest of each block hardly; compensation may go further, as with few bits of any grid."""

_TERNARY = (GGMLQuantizationType.TQ1_0, GGMLQuantizationType.TQ2_0)

T = GGMLQuantizationType
HALVES: dict[T, tuple[int, ...]] = {
    **dict.fromkeys((T.Q4_0, T.Q5_0, T.Q8_0, T.IQ4_NL, T.Q1_0), (0,)),
    **dict.fromkeys((T.Q4_1, T.Q5_1, T.Q8_1, T.Q4_K, T.Q5_K), (0, 2)),
    **dict.fromkeys((T.IQ1_S, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS, T.IQ3_S, T.IQ4_XS), (0,)),
    **{T.Q2_K: (80, 82), T.Q3_K: (108,), T.Q6_K: (208,), T.TQ1_0: (52,), T.TQ2_0: (64,)},
}
"""Where a block's half-precision numbers begin."""
_FLOATS = {T.F16: torch.float16, T.BF16: torch.bfloat16, T.F32: torch.float32, T.F64: torch.float64}
_WHOLE = (T.I8, T.I16, T.I32, T.I64)
_E8M0_INFINITE = 0xFF
_E4M3_NAN = 0x7F


def floor_db(type: GGMLQuantizationType, weighted: bool, matched: bool = False) -> float:
    """The least credible signal to noise ratio of a tensor of a type, in decibels.

    Args:
        type: Its type.
        weighted: Whether an importance or compensation may have moved errors between columns.
        matched: Whether matched calibration may have moved weights before they were rounded.
    """
    if matched and type not in _FLOATS:
        return matched_floor_db(floor_db(type, weighted))
    if type.name in _FLOAT_FLOORS:
        return _WEIGHTED_FP4_FLOOR if weighted and type.name.endswith("FP4") else _FLOAT_FLOORS[type.name]
    if type.name in _LATTICE_FLOORS:
        return _WEIGHTED_LATTICE_FLOOR if weighted else _LATTICE_FLOORS[type.name]
    if type in _TERNARY:
        return _TERNARY_FLOORS[weighted]
    bits = int(next(character for character in type.name if character.isdigit()))
    return snr_floor_db(bits, compensated=weighted)


def least_of_rows(type: GGMLQuantizationType) -> Least:
    """What a sound row of a type has at least.

    By formula nine weights of ten become zeros in TQ1_0 and TQ2_0, if they are not ternary already.
    """
    return Least(cosine=0.2, size=0.0) if type in _TERNARY else USUAL


def decoded(data: Tensor, type: GGMLQuantizationType) -> Tensor:
    """The values of encoded rows, uint8 [rows, bytes]: float32 [rows, columns]."""
    return torch.from_numpy(dequantize(data.numpy(), type).astype("float32", copy=True))


def is_known(type: GGMLQuantizationType) -> bool:
    """Whether it is known where a type's scales are."""
    return type in HALVES or type in _FLOATS or type in _WHOLE or type in (T.MXFP4, T.NVFP4, T.IQ1_M)


def finite_blocks(data: Tensor, type: GGMLQuantizationType) -> Tensor:
    """Which blocks have scales that are finite, bool [blocks].

    Args:
        data: uint8, whole blocks.
        type: Their type, one that :func:`is_known`; of floats an element is a block.
    """
    if type in _WHOLE:
        return torch.ones(1, dtype=torch.bool)
    if type in _FLOATS:
        return torch.isfinite(data.reshape(-1).view(_FLOATS[type]))
    blocks = data.reshape(-1, GGML_QUANT_SIZES[type][1])
    if type is T.MXFP4:
        return blocks[:, 0] != _E8M0_INFINITE
    if type is T.NVFP4:
        return (blocks[:, :4] < _E4M3_NAN).all(1)
    if type is T.IQ1_M:  # its scale's four bits on top of each of four words
        return ((blocks[:, 55] >> 4 & 7) != 7) | ((blocks[:, 53] >> 4 & 12) != 12)
    found = torch.ones(len(blocks), dtype=torch.bool)
    for half in _halves(blocks, HALVES[type]):
        found &= torch.isfinite(half)
    return found


def _halves(blocks: Tensor, offsets: tuple[int, ...]) -> Iterator[Tensor]:
    for offset in offsets:
        yield blocks[:, offset : offset + 2].contiguous().view(torch.float16).flatten()
