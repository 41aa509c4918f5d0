"""What instructions do that touch memory, other lanes or the program counter."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from kernels.proof import warp
from kernels.proof.machine import Machine
from kernels.proof.ptx import TYPE_BYTES, PtxError
from kernels.proof.semantics import CONVERT_MODIFIERS, RULES, UNSIGNED, Array, convert, decode, encode


def accept(modifiers: tuple[str, ...], known: frozenset[str]) -> None:
    unknown = [name for name in modifiers if name not in known and name not in TYPE_BYTES]
    if unknown:
        raise PtxError(f"modifier .{unknown[0]} is not interpreted")


def vector(operand: str) -> list[str]:
    """The registers of a vector operand, or the one that it is."""
    return [name.strip() for name in operand.strip("{}").split(",")]


Handler = Callable[[Machine, tuple[str, ...], tuple[str, ...]], None]


def _branch(machine: Machine, opcode: tuple[str, ...], operands: tuple[str, ...]) -> None:
    machine.counter[machine.active] = machine.function.labels[operands[0]]


def _exit(machine: Machine, opcode: tuple[str, ...], operands: tuple[str, ...]) -> None:
    machine.counter[machine.active] = len(machine.function.instructions)


def _barrier(machine: Machine, opcode: tuple[str, ...], operands: tuple[str, ...]) -> None:
    if opcode[1] == "warp":
        warp.whole(machine.active)
    elif opcode[1] not in ("sync", "cta") or operands != ("0",):
        raise PtxError("only bar.sync 0 is interpreted")
    else:
        machine.waiting |= machine.active


def _move(machine: Machine, opcode: tuple[str, ...], operands: tuple[str, ...]) -> None:
    target, source = operands
    kind = opcode[-1]
    targets, sources = vector(target), vector(source)
    if len(targets) == len(sources) == 1:
        machine.assign(target, machine.value(source, kind), kind)
        return
    part = f"b{8 * TYPE_BYTES[kind] // max(len(targets), len(sources))}"
    if len(sources) > 1:
        parts = np.stack([machine.value(name, part) for name in sources], axis=1)
        machine.assign_bits(target, parts.view(UNSIGNED[TYPE_BYTES[kind]]).reshape(-1))
        return
    whole = np.ascontiguousarray(machine.value(source, kind))
    for name, bits in zip(targets, whole.view(UNSIGNED[TYPE_BYTES[part]]).reshape(machine.lanes, -1).T, strict=True):
        machine.assign(name, bits, part)


def _convert(machine: Machine, opcode: tuple[str, ...], operands: tuple[str, ...]) -> None:
    accept(opcode[1:], CONVERT_MODIFIERS | {"e4m3x2"})
    source = "u16" if opcode[-1] == "e4m3x2" else opcode[-1]
    sources = [machine.value(name, source) for name in operands[1:]]
    machine.assign(operands[0], convert(opcode, sources), opcode[-2])


def _load(machine: Machine, opcode: tuple[str, ...], operands: tuple[str, ...]) -> None:
    names, kind = vector(operands[0]), opcode[-1]
    width = TYPE_BYTES[kind]
    size = width * len(names)
    if "param" in opcode:
        found = re.fullmatch(r"\[([\w$]+)(?:\+(\d+))?\]", operands[1])
        if not found:
            raise PtxError("parameter address is not understood")
        offset = machine.function.parameters[found[1]] + int(found[2] or 0)
        data = np.frombuffer(machine.arguments.ljust(machine.function.parameter_bytes, b"\0"), np.uint8, size, offset)
        data = np.broadcast_to(data, (int(machine.active.sum()), size))
    elif "shared" in opcode:
        data = machine.shared.read(machine.active_lanes(), machine.address(operands[1], "u32"), size)
    elif "global" in opcode or "const" in opcode:
        data = machine.memory.read(machine.address(operands[1]), size)
    else:
        raise PtxError("only param, shared, global and const memory is interpreted")
    for index, name in enumerate(names):
        part = np.ascontiguousarray(data[:, index * width : (index + 1) * width]).view(UNSIGNED[width]).reshape(-1)
        machine.assign(name, decode(machine.scatter(part), kind), kind)


def _bytes_of(machine: Machine, names: list[str], kind: str) -> Array:
    """What the active lanes store: uint8 [lanes, size]."""
    width = TYPE_BYTES[kind]
    parts = [encode(machine.value(name, kind), kind, width)[machine.active] for name in names]
    return np.stack(parts, axis=1).view(np.uint8)


def _store(machine: Machine, opcode: tuple[str, ...], operands: tuple[str, ...]) -> None:
    data = _bytes_of(machine, vector(operands[1]), opcode[-1])
    if "shared" in opcode:
        machine.shared.write(machine.active_lanes(), machine.address(operands[0], "u32"), data)
    elif "global" in opcode:
        machine.memory.write(machine.address(operands[0]), data)
    else:
        raise PtxError("only shared and global memory is interpreted")


def _atomic(machine: Machine, opcode: tuple[str, ...], operands: tuple[str, ...]) -> None:
    """``red`` and ``atom`` on global memory, lane after lane."""
    kind, fetch = opcode[-1], opcode[0] == "atom"
    operation = next((name for name in ("add", "min", "max", "exch", "and", "or") if name in opcode), "")
    if "global" not in opcode or not operation:
        raise PtxError("this atomic is not interpreted")
    addresses = machine.address(operands[int(fetch)])
    if opcode[0] == "red" and kind == "f32" and operation == "add" and "{" not in operands[1]:
        machine.memory.add_f32(addresses, machine.value(operands[1], "f32")[machine.active])
        return
    names = vector(operands[1 + int(fetch)])
    data = _bytes_of(machine, names, kind)
    width = TYPE_BYTES[kind]
    before = np.zeros(len(addresses), UNSIGNED[width])
    for lane, address in enumerate(addresses):
        for part in range(len(names)):
            at = np.array([address + part * width])
            old = machine.memory.read(at, width).view(UNSIGNED[width]).reshape(-1)
            new = np.ascontiguousarray(data[lane, part * width : (part + 1) * width]).view(UNSIGNED[width])
            before[lane] = old[0]
            if operation != "exch":
                rule = RULES[operation]
                new = encode(rule.compute((operation, kind), decode(old, kind), decode(new, kind)), kind, width)
            machine.memory.write(at, new.view(np.uint8).reshape(1, -1))
    if fetch:
        machine.assign(operands[0], decode(machine.scatter(before), kind), kind)


def _copy(machine: Machine, opcode: tuple[str, ...], operands: tuple[str, ...]) -> None:
    if opcode[1] != "async":
        raise PtxError("only cp.async is interpreted")
    if opcode[2] == "commit_group":
        machine.shared.commit(machine.active_lanes())
    elif opcode[2] in ("wait_group", "wait_all"):
        if opcode[2] == "wait_all":
            machine.shared.commit(machine.active_lanes())
        machine.shared.wait(machine.active, int(operands[0]) if operands else 0)
    else:
        size = int(operands[2])
        count = machine.value(operands[3], "u32")[machine.active] if len(operands) > 3 else None
        addresses = machine.address(operands[1])
        data = np.zeros((len(addresses), size), np.uint8)
        full = np.ones(len(addresses), bool) if count is None else count == size
        if count is not None and not (full | (count == 0)).all():
            raise PtxError("cp.async of a part is not interpreted")
        data[full] = machine.memory.read(addresses[full], size)
        machine.shared.copy_async(machine.active_lanes(), machine.address(operands[0], "u32"), data)


def _load_matrix(machine: Machine, opcode: tuple[str, ...], operands: tuple[str, ...]) -> None:
    """``ldmatrix``: lane 8 m + i of a warp addresses row i of its matrix m."""
    warp.whole(machine.active)
    names, lanes = vector(operands[0]), machine.active_lanes()
    if opcode[1:4] != ("sync", "aligned", "m8n8") or opcode[-1] != "b16":
        raise PtxError("this ldmatrix is not interpreted")
    addresses = machine.address(operands[1], "u32").reshape(-1, 4, 8)[:, : len(names)]
    owners = lanes.reshape(-1, 4, 8)[:, : len(names)]
    rows = machine.shared.read(owners.reshape(-1), addresses.reshape(-1), 16)
    fragments = warp.matrix_fragments(rows.reshape(-1, len(names), 8, 16), transposed="trans" in opcode)
    for index, name in enumerate(names):
        machine.assign(name, machine.scatter(fragments[:, index].reshape(-1)), "b32")


def _multiply_matrix(machine: Machine, opcode: tuple[str, ...], operands: tuple[str, ...]) -> None:
    warp.whole(machine.active)
    fragments = [
        np.stack([machine.value(name, "b32")[machine.active].reshape(-1, 32) for name in vector(operand)])
        for operand in operands[1:]
    ]
    result = warp.multiply_accumulate(opcode, *fragments)
    for name, bits in zip(vector(operands[0]), result, strict=True):
        machine.assign(name, machine.scatter(bits.reshape(-1)), "b32")


def _shuffle(machine: Machine, opcode: tuple[str, ...], operands: tuple[str, ...]) -> None:
    warp.whole(machine.active)
    value, lane, clamp = (machine.value(name, "b32")[machine.active].reshape(-1, 32) for name in operands[1:4])
    if "|" in operands[0]:
        raise PtxError("shfl with a predicate is not interpreted")
    machine.assign(operands[0], machine.scatter(warp.shuffle(opcode[2], value, lane, clamp).reshape(-1)), "b32")


EFFECTS: dict[str, Handler] = {
    "bra": _branch,
    "ret": _exit,
    "exit": _exit,
    "bar": _barrier,
    "barrier": _barrier,
    "mov": _move,
    "cvt": _convert,
    "ld": _load,
    "st": _store,
    "red": _atomic,
    "atom": _atomic,
    "cp": _copy,
    "ldmatrix": _load_matrix,
    "mma": _multiply_matrix,
    "shfl": _shuffle,
}
