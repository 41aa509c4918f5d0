"""Runs PTX on the CPU: what a compiler really emitted, inline assembly included.

Lanes run in order of their program counters, lowest first, basic block by basic block. That is one legal schedule:
races are the emulator's to find (kernels/emulator). A barrier holds a block until all its threads have arrived.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kernels.proof.effects import EFFECTS, accept
from kernels.proof.machine import Machine
from kernels.proof.memory import Traffic
from kernels.proof.ptx import Function, Instruction, PtxError
from kernels.proof.semantics import RULES, Array, flush_subnormals

_MOST_LANES = 1 << 14
_IGNORED = frozenset({"prefetch", "createpolicy", "membar", "fence", "griddepcontrol", "discard"})
"""Instructions that change no value here: every write is seen at once by all."""
_WIDENED = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def run(
    function: Function,
    grid: tuple[int, int, int],
    threads: int,
    shared_bytes: int,
    arguments: bytes,
    buffers: Sequence[Array],
    traffic: Traffic | None = None,
) -> int:
    """Launch a kernel and wait for it.

    Args:
        function: From :func:`kernels.proof.ptx.parse`.
        grid: Blocks along x, y and z.
        threads: Of a block; a multiple of 32.
        shared_bytes: Dynamic shared memory of a block.
        arguments: The parameter block.
        buffers: uint8 arrays that the pointers in ``arguments`` point into; see :func:`memory_of`.
        traffic: Counts accesses to them, if given.

    Returns:
        The number of instructions that ran, a warp's counted once.

    Raises:
        PtxError: an instruction or modifier is not understood, or the program does what is not defined.
    """
    if threads % 32 or threads > (function.max_threads or 1024):
        raise PtxError(f"{function.name}: cannot run with {threads} threads")
    if len(arguments) > function.parameter_bytes or len(arguments) <= function.parameter_bytes - 8:
        raise PtxError(f"{function.name}: takes {function.parameter_bytes} bytes of arguments, not {len(arguments)}")
    blocks = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    at_once = max(1, _MOST_LANES // threads)
    steps = 0
    for first in range(0, len(blocks), at_once):
        some = blocks[first : first + at_once]
        machine = Machine(function, grid, threads, shared_bytes, arguments, buffers, some, traffic)
        with np.errstate(all="ignore"):
            steps += _run_blocks(machine)
    return steps


def memory_of(tensor: torch.Tensor) -> Array:
    """A tensor's memory as the uint8 array that :func:`run` takes.

    Raises:
        PtxError: the tensor is not contiguous.
    """
    if not tensor.is_contiguous():
        raise PtxError("a kernel's tensor must be contiguous")
    array: Array = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return array


def _run_blocks(machine: Machine) -> int:
    """Run every lane to its end; the number of instructions of warps."""
    code = machine.function.instructions
    ends = _block_ends(machine.function)
    steps = 0
    while True:
        runnable = ~machine.waiting & (machine.counter < len(code))
        if runnable.any():
            start = int(machine.counter[runnable].min())
            here = runnable & (machine.counter == start)
            machine.counter[here] = ends[start]
            for instruction in code[start : ends[start]]:
                steps += _step(machine, instruction, here)
        elif machine.waiting.any():
            _release(machine)
        else:
            return steps


def _block_ends(function: Function) -> list[int]:
    """For every instruction, the end of its basic block: the next label, or what follows the next jump."""
    code, starts = function.instructions, set(function.labels.values())
    ends, end = [0] * len(code), len(code)
    for at in reversed(range(len(code))):
        if at + 1 in starts or code[at].opcode[0] in ("bra", "ret", "exit", "bar", "barrier"):
            end = at + 1
        ends[at] = end
    return ends


def _release(machine: Machine) -> None:
    """Open the barriers at which every thread of a block that has not exited waits."""
    blocks = (-1, machine.threads)
    counter, arrived = machine.counter.reshape(blocks), machine.waiting.reshape(blocks)
    alive = counter < len(machine.function.instructions)
    place = np.where(arrived, counter, -1)
    same = (place == place.max(axis=1, keepdims=True)) | ~alive
    ready = (arrived | ~alive).all(axis=1) & same.all(axis=1) & arrived.any(axis=1)
    if not ready.any():
        raise PtxError(f"{machine.function.name}: threads of a block wait at different barriers")
    machine.waiting = (arrived & ~ready[:, None]).reshape(-1)


def _step(machine: Machine, instruction: Instruction, here: Array) -> int:
    """Run one instruction in the lanes that are here; the number of warps that ran it."""
    machine.active = here
    try:
        if instruction.predicate:
            machine.active = here & (machine.value(instruction.predicate, "pred") ^ instruction.negated)
            if not machine.active.any():
                return 0
        mnemonic = instruction.opcode[0]
        if effect := EFFECTS.get(mnemonic):
            effect(machine, instruction.opcode, instruction.operands)
        elif mnemonic not in _IGNORED:
            _compute(machine, instruction.opcode, instruction.operands)
    except PtxError as error:
        raise PtxError(f"{machine.function.name}: {instruction}: {error}") from None
    except (KeyError, IndexError, ValueError) as error:
        raise PtxError(f"{machine.function.name}: {instruction}: not understood ({error!r})") from error
    return int(machine.active.reshape(-1, 32).any(axis=1).sum())


def _compute(machine: Machine, opcode: tuple[str, ...], operands: tuple[str, ...]) -> None:
    """An instruction of the table of rules."""
    rule = RULES.get(".".join(opcode[:2])) or RULES.get(opcode[0])
    kind = opcode[-1]
    if rule is None:
        raise PtxError("this instruction is not interpreted")
    accept(opcode[1:-1], rule.accepts)
    wide = _WIDENED.get(kind, "")
    types = [rule.source_type(index, kind) for index in range(len(operands) - 1)]
    sources = [
        machine.value(name, wide if type_ == "wide" else type_) for name, type_ in zip(operands[1:], types, strict=True)
    ]
    if "ftz" in opcode:
        sources = [flush_subnormals(source) if source.dtype.kind == "f" else source for source in sources]
    values = rule.compute(opcode, *sources)
    if "ftz" in opcode and values.dtype.kind == "f":
        values = flush_subnormals(values)
    machine.assign(operands[0], values, wide if rule.result == "wide" else rule.result or kind)
