"""What each PTX instruction computes: one table from mnemonic to a NumPy expression over all lanes.

Those that touch memory, other lanes or the program counter are in :mod:`kernels.proof.effects`.
Reference: NVIDIA, "Parallel Thread Execution ISA", chapter 9.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kernels.proof.ptx import TYPE_BYTES, PtxError

Array: TypeAlias = npt.NDArray[Any]
"""One value a lane (``[lanes]``), or for packed types two (``[lanes, 2]``, the lower one first)."""

UNSIGNED: dict[int, np.dtype[Any]] = {width: np.dtype(f"u{width}") for width in (1, 2, 4, 8)}
_SIGNED: dict[int, np.dtype[Any]] = {width: np.dtype(f"i{width}") for width in (1, 2, 4, 8)}
_FLOAT: dict[str, np.dtype[Any]] = {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8")}


# ---- values and their bits


def decode(bits: Array, kind: str) -> Array:
    """The values of raw register bits (an unsigned array): halves as float32, since their results are rounded once."""
    if kind == "pred":
        return bits.astype(bool)
    raw = bits.astype(UNSIGNED[TYPE_BYTES[kind]], copy=False)
    if kind == "f32x2":
        return np.ascontiguousarray(raw).view(np.float32).reshape(-1, 2)
    if kind in ("f16x2", "bf16x2"):
        raw = np.ascontiguousarray(raw).view(np.uint16).reshape(-1, 2)
    if kind.startswith("bf16"):
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind.startswith("f16"):
        return raw.view(np.float16).astype(np.float32)
    if kind in _FLOAT:
        return raw.view(_FLOAT[kind])
    return raw.view(_SIGNED[raw.itemsize]) if kind[0] == "s" else raw


def encode(values: Array, kind: str, width: int) -> Array:
    """The bits of values of a type, in a register of ``width`` bytes; a signed integer narrower than it is extended."""
    if kind == "pred":
        return values.astype(np.uint8)
    if kind == "f32x2":
        return np.ascontiguousarray(values.astype(np.float32)).view(np.uint64).reshape(-1)
    if kind.startswith("bf16"):
        bits = np.ascontiguousarray(bf16_bits(values))
    elif kind.startswith("f16"):
        bits = np.ascontiguousarray(values.astype(np.float16)).view(np.uint16)
    elif kind in _FLOAT:
        bits = np.ascontiguousarray(values.astype(_FLOAT[kind])).view(UNSIGNED[TYPE_BYTES[kind]])
    else:
        signed = kind[0] == "s"
        values = values.astype((_SIGNED if signed else UNSIGNED)[TYPE_BYTES[kind]], copy=False)
        bits = values.astype(_SIGNED[width], copy=False).view(UNSIGNED[width]) if signed else values
    if kind.endswith("x2"):
        bits = bits.view(np.uint32).reshape(-1)
    return bits.astype(UNSIGNED[width], copy=False)


def bf16_bits(values: Array) -> Array:
    """Round to bfloat16, nearest even, from any float; by way of round-to-odd, so only once."""
    single = values.astype(np.float32)
    bits = np.ascontiguousarray(single).view(np.uint32)
    if values.dtype == np.float64:
        inexact = (single.astype(np.float64) != values) & np.isfinite(single)
        away = np.abs(single.astype(np.float64)) > np.abs(values)
        bits = np.where(inexact, (bits - away.astype(np.uint32)) | np.uint32(1), bits)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(single), np.uint32(0x7FFF), rounded).astype(np.uint16)


def e4m3_values() -> Array:
    """The 256 numbers of float8 E4M3 (OCP 8-bit floating point, section 5.1), as float32."""
    codes = np.arange(256)
    exponent, fraction = codes >> 3 & 15, codes & 7
    magnitude = np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10.0))
    magnitude = np.where(codes & 127 == 127, np.nan, magnitude)
    return np.where(codes & 128, -magnitude, magnitude).astype(np.float32)


_E4M3 = e4m3_values()


# ---- the table

Modifiers: TypeAlias = tuple[str, ...]
Compute: TypeAlias = Callable[..., Array]


@dataclass(frozen=True, slots=True)
class Rule:
    """How one mnemonic computes.

    Attributes:
        compute: From the opcode and the decoded sources to the values of the result.
        sources: Types of the sources; "" is the instruction's own type. The last one stands for all that follow.
        result: Type of the result; "" is the instruction's own.
        accepts: Modifiers beside the types that the expression honours; others raise.
    """

    compute: Compute
    sources: tuple[str, ...] = ("",)
    result: str = ""
    accepts: frozenset[str] = frozenset()

    def source_type(self, index: int, kind: str) -> str:
        """The type of source ``index`` of an instruction of type ``kind``."""
        return self.sources[min(index, len(self.sources) - 1)] or kind


def _exactly(compute: Callable[..., Array]) -> Compute:
    """Floats are computed in f64, where a product and a sum of halves are exact, and rounded once.

    For f32 that is the IEEE result of add, sub and mul too, since f64 has more than twice its digits; an fma of f32 can
    differ from it in rare ties.
    """

    def widened(_: Modifiers, *sources: Array) -> Array:
        if sources[0].dtype.kind == "f":
            return compute(*(source.astype(np.float64) for source in sources))
        return compute(*sources)

    return widened


def _plain(compute: Callable[..., Array]) -> Compute:
    return lambda _, *sources: compute(*sources)


_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_COMBINATIONS: dict[str, Callable[[Array, Array], Array]] = {
    "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor,
}  # fmt: skip


def _compare(opcode: Modifiers, first: Array, second: Array, *combined: Array) -> Array:
    outcome = _COMPARISONS[opcode[1]](first, second)
    return _COMBINATIONS[opcode[2]](outcome, combined[0]) if combined else outcome


def _wide(_: Modifiers, first: Array, second: Array, *addend: Array) -> Array:
    double = (_SIGNED if first.dtype.kind == "i" else UNSIGNED)[2 * first.itemsize]
    product: Array = first.astype(double) * second.astype(double)
    return np.add(product, addend[0]) if addend else product


def _high(_: Modifiers, first: Array, second: Array, *addend: Array) -> Array:
    if first.itemsize > 4:
        raise PtxError("mul.hi of 64 bits is not interpreted")
    high: Array = (_wide(_, first, second) >> (8 * first.itemsize)).astype(first.dtype)
    return np.add(high, addend[0]) if addend else high


def _divide(_: Modifiers, first: Array, second: Array) -> Array:
    if first.dtype.kind == "f":
        return first.astype(np.float64) / second.astype(np.float64)
    divisor = np.where(second == 0, 1, second).astype(np.int64 if first.dtype.kind == "i" else np.uint64)
    quotient = np.abs(first.astype(divisor.dtype)) // np.abs(divisor)
    return np.where((first < 0) != (second < 0), -quotient.astype(np.int64), quotient).astype(first.dtype)


def _remainder(opcode: Modifiers, first: Array, second: Array) -> Array:
    rest: Array = first - _divide(opcode, first, second) * second
    return rest


def _shift_left(_: Modifiers, value: Array, count: Array) -> Array:
    limit = 8 * value.itemsize
    return np.where(count < limit, value << np.minimum(count, limit - 1).astype(value.dtype), 0).astype(value.dtype)


def _shift_right(_: Modifiers, value: Array, count: Array) -> Array:
    limit = 8 * value.itemsize
    shifted = value >> np.minimum(count, limit - 1).astype(value.dtype)
    return shifted if value.dtype.kind == "i" else np.where(count < limit, shifted, 0).astype(value.dtype)


def _funnel(opcode: Modifiers, low: Array, high: Array, count: Array) -> Array:
    amount = (np.minimum(count, 32) if opcode[2] == "clamp" else count & 31).astype(np.uint64)
    joined = (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)
    moved = joined >> amount if opcode[1] == "r" else (joined << amount) >> np.uint64(32)
    return moved.astype(np.uint32)


def _lop3(_: Modifiers, first: Array, second: Array, third: Array, table: Array) -> Array:
    result = np.zeros_like(first)
    for row in range(8):
        if int(table[0]) >> row & 1:
            terms = zip((first, second, third), (4, 2, 1), strict=True)
            a, b, c = (source if row & bit else ~source for source, bit in terms)
            result |= a & b & c
    return result


def _permute(_: Modifiers, low: Array, high: Array, selector: Array) -> Array:
    pool = np.stack([low, high], axis=1).view(np.uint8)
    nibbles = (selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & np.uint32(15)
    chosen = np.take_along_axis(pool, (nibbles & np.uint32(7)).astype(np.int64), axis=1)
    sign = np.where(chosen & 0x80, 0xFF, 0).astype(np.uint8)
    return np.ascontiguousarray(np.where(nibbles & np.uint32(8), sign, chosen)).view(np.uint32).reshape(-1)


def _field_mask(length: Array, kind: np.dtype[Any]) -> Array:
    return np.where(
        length >= 32, np.uint64(0xFFFFFFFF), (np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)
    ).astype(kind)


def _insert(_: Modifiers, field: Array, base: Array, position: Array, length: Array) -> Array:
    mask = _shift_left(_, _field_mask(length & 255, base.dtype), position & 255)
    return (_shift_left(_, field, position & 255) & mask) | (base & ~mask)


def _extract(opcode: Modifiers, value: Array, position: Array, length: Array) -> Array:
    if value.dtype.kind == "i":
        left = 32 - np.minimum(length + position, 32)
        return _shift_right(opcode, _shift_left(opcode, value, left), 32 - np.minimum(length, 32))
    return _shift_right(opcode, value, position & 255) & _field_mask(length & 255, value.dtype)


def _dot(opcode: Modifiers, first: Array, second: Array, addend: Array) -> Array:
    lanes = [
        np.ascontiguousarray(word).view(np.uint32).reshape(-1, 1).view(np.int8 if kind == "s32" else np.uint8)
        for word, kind in ((first, opcode[1]), (second, opcode[2]))
    ]
    total: Array = (lanes[0].astype(np.int64) * lanes[1]).sum(axis=1) + addend
    return total


def _bits_of(value: Array) -> Array:
    """One bit a column, lowest first."""
    positions = np.arange(8 * value.itemsize, dtype=value.dtype)
    bits: Array = (value[:, None] >> positions) & value.dtype.type(1)
    return bits


def _leading_zeros(_: Modifiers, value: Array) -> Array:
    bits = _bits_of(value)[:, ::-1]
    zeros: Array = np.where(bits.any(axis=1), bits.argmax(axis=1), bits.shape[1])
    return zeros


def _negate(_: Modifiers, value: Array) -> Array:
    negated: Array = -value if value.dtype.kind == "f" else ~value + value.dtype.type(1)
    return negated


def _select(_: Modifiers, first: Array, second: Array, chosen: Array) -> Array:
    return np.where(chosen, first, second)


_FLOATS = frozenset({"rn", "ftz"})
"""Round to nearest even; ``ftz`` (subnormal f32 sources and results become zero) is the machine's to apply."""
_FAST = frozenset({"approx", "full", "ftz", "rn"})

RULES: dict[str, Rule] = {
    "add": Rule(_exactly(np.add), accepts=_FLOATS),
    "sub": Rule(_exactly(np.subtract), accepts=_FLOATS),
    "mul": Rule(_exactly(np.multiply), accepts=_FLOATS | {"lo"}),
    "mul.wide": Rule(_wide, result="wide", accepts=frozenset({"wide"})),
    "mul.hi": Rule(_high, accepts=frozenset({"hi"})),
    "mad": Rule(_exactly(lambda a, b, c: a * b + c), accepts=_FLOATS | {"lo"}),
    "mad.wide": Rule(_wide, ("", "", "wide"), result="wide", accepts=frozenset({"wide"})),
    "mad.hi": Rule(_high, accepts=frozenset({"hi"})),
    "fma": Rule(_exactly(lambda a, b, c: a * b + c), accepts=_FLOATS),
    "div": Rule(_divide, accepts=_FAST),
    "rem": Rule(_remainder),
    "neg": Rule(_negate, accepts=frozenset({"ftz"})),
    "abs": Rule(_plain(np.abs), accepts=frozenset({"ftz"})),
    "min": Rule(_plain(np.fmin), accepts=frozenset({"ftz"})),
    "max": Rule(_plain(np.fmax), accepts=frozenset({"ftz"})),
    "rcp": Rule(_exactly(lambda a: 1 / a), accepts=_FAST),
    "sqrt": Rule(_exactly(np.sqrt), accepts=_FAST),
    "ex2": Rule(_exactly(np.exp2), accepts=_FAST),
    "and": Rule(_plain(np.bitwise_and)),
    "or": Rule(_plain(np.bitwise_or)),
    "xor": Rule(_plain(np.bitwise_xor)),
    "not": Rule(_plain(np.invert)),
    "shl": Rule(_shift_left, ("", "u32")),
    "shr": Rule(_shift_right, ("", "u32")),
    "shf": Rule(_funnel, ("u32",), result="u32", accepts=frozenset({"l", "r", "wrap", "clamp"})),
    "lop3": Rule(_lop3, ("b32",)),
    "prmt": Rule(_permute, ("b32",)),
    "bfi": Rule(_insert, ("", "", "u32")),
    "bfe": Rule(_extract, ("", "u32")),
    "popc": Rule(lambda _, value: _bits_of(value).sum(axis=1), result="u32"),
    "clz": Rule(_leading_zeros, result="u32"),
    "brev": Rule(lambda _, v: (_bits_of(v)[:, ::-1] << np.arange(8 * v.itemsize, dtype=v.dtype)).sum(axis=1)),
    "dp4a": Rule(_dot, ("b32", "b32", ""), accepts=frozenset({"u32", "s32"})),
    "selp": Rule(_select, ("", "", "pred")),
    "setp": Rule(_compare, ("", "", "pred"), "pred", frozenset(_COMPARISONS) | frozenset(_COMBINATIONS) | {"ftz"}),
    "cvta": Rule(_plain(lambda a: a), accepts=frozenset({"to", "global"})),
}
"""By mnemonic, or by mnemonic and first modifier where that changes the operation."""


def convert(opcode: Modifiers, sources: Sequence[Array]) -> Array:
    """``cvt``: what is rounded into the type ``opcode[-2]``, from sources decoded as ``opcode[-1]``."""
    target, source = opcode[-2:]
    if source == "e4m3x2":
        raw = np.ascontiguousarray(sources[0].astype(np.uint16)).view(np.uint8).reshape(-1, 2)
        return _E4M3[raw]
    if target.endswith("x2"):
        return np.stack([sources[1], sources[0]], axis=1)
    value = sources[0]
    if target[0] not in "us":
        return value.astype(np.float64) if value.dtype.kind in "iu" else value
    if value.dtype.kind in "iu":
        return value
    rounding = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    rounded = next((rounding[name](value) for name in opcode if name in rounding), None)
    if rounded is None:
        raise PtxError(f"cvt without a rounding: {'.'.join(opcode)}")
    limits = np.iinfo((_SIGNED if target[0] == "s" else UNSIGNED)[TYPE_BYTES[target]])
    return np.clip(np.nan_to_num(rounded.astype(np.float64)), limits.min, limits.max)


def flush_subnormals(values: Array) -> Array:
    """``ftz``: subnormal f32 numbers become zeros of their sign."""
    return np.where(np.abs(values) < 2.0**-126, np.copysign(0.0, values), values).astype(values.dtype)


CONVERT_MODIFIERS = frozenset({"rn", "rni", "rzi", "rmi", "rpi"})
