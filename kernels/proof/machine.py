"""The state of the machine that PTX runs on: registers, memory, and which threads are where.

Every thread of the blocks that run at once is a lane of NumPy arrays, so one instruction is a few array operations.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from kernels.proof.memory import GlobalMemory, SharedMemory, Traffic
from kernels.proof.ptx import TYPE_BYTES, Function, PtxError
from kernels.proof.semantics import UNSIGNED, Array, decode, encode


class Machine:
    """The state of the blocks that run at once."""

    def __init__(
        self,
        function: Function,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        arguments: bytes,
        buffers: Sequence[Array],
        blocks: Sequence[tuple[int, int, int]],
        traffic: Traffic | None = None,
    ) -> None:
        self.function = function
        self.threads = threads
        self.lanes = threads * len(blocks)
        self.arguments = arguments
        self.constants = {name: np.frombuffer(data, np.uint8) for name, data in function.constants.items()}
        self.memory = GlobalMemory([*buffers, *self.constants.values()], traffic)
        self.shared = SharedMemory(function.static_bytes + shared_bytes, len(blocks), threads)
        self.registers: dict[str, Array] = {}
        self.counter = np.zeros(self.lanes, np.int64)
        self.waiting = np.zeros(self.lanes, bool)
        self.active = np.ones(self.lanes, bool)
        thread = np.tile(np.arange(threads, dtype=np.uint32), len(blocks))
        self.special = {"%tid.x": thread, "%laneid": thread % 32, "%warpid": thread // 32}
        for axis, index in zip("xyz", np.repeat(np.array(blocks, np.uint32), threads, axis=0).T, strict=True):
            self.special[f"%ctaid.{axis}"] = index
        for axis, size, extent in zip("xyz", (threads, 1, 1), grid, strict=True):
            self.special[f"%ntid.{axis}"] = np.full(self.lanes, size, np.uint32)
            self.special[f"%nctaid.{axis}"] = np.full(self.lanes, extent, np.uint32)
        self.special |= dict.fromkeys(("%tid.y", "%tid.z"), np.zeros(self.lanes, np.uint32))

    def value(self, operand: str, kind: str) -> Array:
        """An operand's value in every lane."""
        if operand[0] == "!":
            return ~self.value(operand[1:], kind)
        if operand in self.special:
            return decode(self.special[operand], kind)
        if operand[0] == "%":
            if operand not in self.registers:
                raise PtxError(f"{operand} is read before it is written")
            return decode(self.registers[operand], kind)
        if operand in self.function.shared:
            return np.full(self.lanes, self.function.shared[operand], UNSIGNED[TYPE_BYTES[kind]])
        if operand in self.constants:
            return np.full(self.lanes, self.constants[operand].ctypes.data, np.uint64)
        return np.broadcast_to(decode(_immediate(operand, kind), kind), (self.lanes, *([2] * kind.endswith("x2"))))

    def assign(self, register: str, values: Array, kind: str) -> None:
        """Set a register in the active lanes."""
        if register == "_":
            return
        self.assign_bits(register, encode(values, kind, TYPE_BYTES[self._declared(register)]))

    def assign_bits(self, register: str, bits: Array) -> None:
        """Set a register's raw bits in the active lanes."""
        old = self.registers.get(register)
        if self.active.all():
            self.registers[register] = bits.copy()
        elif old is None:
            self.registers[register] = np.where(self.active, bits, bits.dtype.type(0))
        else:
            self.registers[register] = np.where(self.active, bits, old)

    def _declared(self, register: str) -> str:
        return self.function.registers.get(register) or self.function.registers[register.rstrip("0123456789")]

    def address(self, operand: str, kind: str = "u64") -> Array:
        """The address in brackets, int64, in the active lanes only."""
        found = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if not found:
            raise PtxError(f"address {operand} is not understood")
        base = self.value(found[1], kind) if not found[1].isdigit() else np.full(self.lanes, int(found[1]))
        address: Array = base[self.active].astype(np.int64) + int(found[2] or 0)
        return address

    def active_lanes(self) -> Array:
        """Indices of the active lanes."""
        return np.flatnonzero(self.active)

    def scatter(self, values: Array) -> Array:
        """Values of the active lanes, laid out over all lanes."""
        out = np.zeros((self.lanes, *values.shape[1:]), values.dtype)
        out[self.active] = values
        return out


def _immediate(text: str, kind: str) -> Array:
    width = TYPE_BYTES[kind]
    if text[:2] in ("0f", "0F", "0d", "0D"):
        return np.array([int(text[2:], 16)], UNSIGNED[4 if text[1] in "fF" else 8])
    return np.array([int(text.rstrip("U"), 0) % (1 << 8 * width)], UNSIGNED[width])
