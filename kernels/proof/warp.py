"""Instructions of a whole warp: fragments of ldmatrix and mma, shuffles.

Fragment layouts are those of the PTX ISA, "Matrix Fragments for mma.m16n8k16" and its siblings: with g = lane / 4 and
t = lane % 4, register i of A holds row g + 8 (i & 1) and, of E elements a register, columns t E + 4 E (i >> 1) and on.
"""

from __future__ import annotations

import numpy as np

from kernels.proof.ptx import PtxError
from kernels.proof.semantics import Array, decode, e4m3_values

_GROUP, _MEMBER = np.arange(32) // 4, np.arange(32) % 4


def whole(active: Array) -> None:
    """Check that warps are active as a whole or not at all.

    Raises:
        PtxError: a part of a warp reaches an instruction of the whole warp.
    """
    warps = active.reshape(-1, 32)
    if (warps.any(axis=1) != warps.all(axis=1)).any():
        raise PtxError("a part of a warp reaches an instruction of the whole warp")


def matrix_fragments(rows: Array, *, transposed: bool) -> Array:
    """What ``ldmatrix`` gives each lane.

    Args:
        rows: uint8 [warps, matrices, 8, 16].
        transposed: Whether each 8 x 8 matrix of halves is transposed.

    Returns:
        uint32 [warps, matrices, 32].
    """
    halves = rows.view(np.uint16)
    if transposed:
        halves = np.ascontiguousarray(halves.swapaxes(2, 3))
    words: Array = halves.view(np.uint32).reshape(*rows.shape[:2], 32)
    return words


def multiply_accumulate(opcode: tuple[str, ...], a: Array, b: Array, c: Array) -> Array:
    """``mma.sync.aligned.m16n8kK.row.col.f32.T.T.f32``, summed in float64 and rounded once.

    The hardware's order and precision of the sum are not documented; no test may rest on its last bits.

    Args:
        opcode: Of the instruction.
        a: uint32 [registers, warps, 32], likewise ``b``.
        c: The f32 accumulator's bits, uint32 [4, warps, 32].

    Returns:
        The bits of the new accumulator, uint32 [4, warps, 32].
    """
    shape, kinds = opcode[3], opcode[-4:]
    kind = kinds[1]
    if not shape.startswith("m16n8k") or kinds[0] != "f32" or kinds[3] != "f32" or kinds[2] != kind:
        raise PtxError("this mma is not interpreted")
    depth = int(shape.removeprefix("m16n8k"))
    each = {"f16": 2, "bf16": 2, "e4m3": 4}[kind]
    if len(a) * each * 64 != 16 * depth * 2 or len(b) * each * 32 != 8 * depth:
        raise PtxError("the fragments do not fit the shape")
    left = np.zeros((a.shape[1], 16, depth))
    right = np.zeros((a.shape[1], depth, 8))
    total = np.zeros((a.shape[1], 16, 8))
    for index, register in enumerate(a):
        for element, values in enumerate(_elements(register, kind)):
            left[:, _GROUP + 8 * (index & 1), _MEMBER * each + element + 4 * each * (index >> 1)] = values
    for index, register in enumerate(b):
        for element, values in enumerate(_elements(register, kind)):
            right[:, _MEMBER * each + element + 4 * each * index, _GROUP] = values
    for index, register in enumerate(c):
        total[:, _GROUP + 8 * (index >> 1), _MEMBER * 2 + (index & 1)] = register.view(np.float32)
    total += left @ right
    picked = [total[:, _GROUP + 8 * (index >> 1), _MEMBER * 2 + (index & 1)] for index in range(4)]
    return np.stack(picked).astype(np.float32).view(np.uint32)


def _elements(register: Array, kind: str) -> list[Array]:
    """The values packed in a register, lowest first, each [warps, 32]."""
    bits = np.ascontiguousarray(register)
    if kind == "e4m3":
        table = e4m3_values()
        return [table[bits >> np.uint32(8 * index) & np.uint32(255)] for index in range(4)]
    pairs = decode(bits.reshape(-1), f"{kind}x2").reshape(*register.shape, 2)
    return [pairs[..., 0], pairs[..., 1]]


def shuffle(mode: str, value: Array, operand: Array, clamp: Array) -> Array:
    """``shfl.sync`` over all of a warp; each argument is [warps, 32].

    A lane whose source lies outside its segment keeps its own value.
    """
    lane = np.arange(32)
    segment = (clamp >> 8 & 31).astype(np.int64)
    limit = (clamp & 31).astype(np.int64)
    distance = (operand & 31).astype(np.int64)
    lowest, highest = lane & segment, (lane & segment) | (limit & ~segment)
    source = {
        "bfly": lane ^ distance,
        "down": lane + distance,
        "up": lane - distance,
        "idx": lowest | (distance & ~segment),
    }[mode]
    inside = source >= highest if mode == "up" else source <= highest
    return np.take_along_axis(value, np.where(inside, source, lane), axis=1)
