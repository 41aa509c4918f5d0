"""What a kernel can reach at most, from its machine code alone: occupancy, bound of each pipe, share of DRAM bandwidth.

This is a model, not a measurement. It takes all warps of an SM to be spread evenly over its four quarters, and knows no
stall but the two it names: a pipe that is full, and too few bytes in flight to cover the DRAM's latency (Little's law).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kernels.proof.chips import BLOCKS, DRAM_LATENCY, INTEGER_LANES, REGISTERS, RESERVED_SHARED, Chip
from kernels.proof.sass import MachineCode, MachineInstruction

_QUARTERS = 4
# fmt: off
_INTEGER = frozenset({
    "LOP3", "SHF", "SHL", "SHR", "PRMT", "IADD", "IADD3", "LEA", "ISETP", "SEL", "VIADD", "IMNMX",
    "VIMNMX", "PLOP3", "FSETP", "BFI", "SGXT", "FLO", "POPC", "IDP", "MOV", "F2FP", "I2FP",
})
# fmt: on
_MULTIPLY = frozenset({"IMAD"})
_FLOAT = frozenset({"FFMA", "FMUL", "FADD"})
_FLOAT2 = frozenset({"FFMA2", "FMUL2", "FADD2"})
_HALF2 = frozenset({"HFMA2", "HMUL2", "HADD2", "HSETP2", "HMNMX2"})
_CONVERT = frozenset({"F2F", "I2F", "F2I", "MUFU"})
_MEMORY = frozenset({"LDS", "STS", "LDSM", "LDG", "LDGSTS", "STG", "RED", "REDG", "ATOMG", "SHFL"})


@dataclass(frozen=True, slots=True)
class Launched:
    """How a kernel is launched, as far as the model needs it.

    Attributes:
        threads: Of a block.
        shared_bytes: Dynamic shared memory of a block.
        pass_bytes: DRAM bytes that a block reads in one pass of its main loop.
        flight_bytes: DRAM bytes that a block has under way at any time.
        refreshed: In which share of the passes the parameters of a new group are read.
        inner_passes: How often a loop within the main loop runs in each of its passes.
    """

    threads: int
    shared_bytes: int
    pass_bytes: float
    flight_bytes: float
    refreshed: float = 1.0
    inner_passes: int = 1


@dataclass(frozen=True, slots=True)
class Estimate:
    """The model's answer for one kernel on one chip.

    Attributes:
        blocks: Resident blocks of an SM.
        occupancy: Resident warps over the most that there can be.
        cycles: Cycles of an SM quarter that one pass of one warp takes, by pipe.
        pipe_bandwidth: DRAM bytes a second that the busiest pipe keeps up with.
        flight_bandwidth: DRAM bytes a second that the bytes in flight sustain.
        share: Of the chip's DRAM bandwidth, at most 1.
    """

    blocks: int
    occupancy: float
    cycles: dict[str, float]
    pipe_bandwidth: float
    flight_bandwidth: float
    share: float

    @property
    def bound(self) -> str:
        """What limits the kernel: ``DRAM``, ``latency`` or a pipe."""
        if self.share == 1:
            return "DRAM"
        return (
            "latency" if self.flight_bandwidth < self.pipe_bandwidth else max(self.cycles, key=self.cycles.__getitem__)
        )


def resident_blocks(chip: Chip, registers: int, threads: int, shared_bytes: int) -> int:
    """Blocks that fit an SM at once; each quarter gives out its registers to its warps in units of 256."""
    warps = threads // 32
    by_registers = _QUARTERS * (REGISTERS // _QUARTERS // (-(-registers * 32 // 256) * 256)) // warps
    by_shared = chip.shared_bytes // (shared_bytes + RESERVED_SHARED)
    return min(by_registers, by_shared, chip.warps // warps, BLOCKS[chip.arch])


def frequencies(loop: Sequence[MachineInstruction], refreshed: float, inner_passes: int = 1) -> list[float]:
    """How often each instruction runs in a pass.

    What a forward branch can skip runs always where it has tensor cores' work or copies in it. Else it refreshes
    parameters; and what lies deeper in there is one of two alternatives, taken half of the time each.
    """
    shares = [1.0] * len(loop)
    depths = [0] * len(loop)
    for branch in loop[:-1]:
        if branch.target is not None and branch.target < branch.address:
            for at, each in enumerate(loop):
                if branch.target <= each.address <= branch.address:
                    shares[at] *= inner_passes
    for branch in loop:
        if branch.target is None or branch.target <= branch.address:
            continue
        inside = [at for at, each in enumerate(loop) if branch.address < each.address < branch.target]
        if not any(loop[at].mnemonic in ("HMMA", "LDGSTS") for at in inside):
            for at in inside:
                shares[at] *= 0.5 if depths[at] else refreshed
                depths[at] += 1
    return shares


def pipe_cycles(
    loop: Sequence[MachineInstruction], chip: Chip, refreshed: float = 1.0, inner_passes: int = 1
) -> dict[str, float]:
    """Cycles of an SM quarter that each pipe is busy with one warp's pass through a loop."""
    cycles = dict.fromkeys(("issue", "integer", "float", "half", "convert", "memory", "tensor"), 0.0)
    per_lane = 32 * _QUARTERS
    for instruction, share in zip(loop, frequencies(loop, refreshed, inner_passes), strict=True):
        name = instruction.mnemonic
        cycles["issue"] += share
        if name in _INTEGER:
            cycles["integer"] += share * per_lane / INTEGER_LANES
        elif name in _MULTIPLY:
            cycles["float"] += share * per_lane / INTEGER_LANES
        elif name in _FLOAT:
            cycles["float"] += share * per_lane / chip.fma_lanes
        elif name in _FLOAT2:
            cycles["float"] += share * 2 * per_lane / chip.fma_lanes
        elif name in _HALF2:
            cycles["half"] += share * per_lane / chip.half2_lanes
        elif name in _CONVERT:
            cycles["convert"] += share * per_lane / 16
        elif name in _MEMORY:
            cycles["memory"] += share * _QUARTERS * _wavefronts(instruction)
        elif name == "HMMA":
            cycles["tensor"] += share * chip.hmma_cycles * (1 if ".16816." in instruction.opcode else 0.5)
    return cycles


def _wavefronts(instruction: MachineInstruction) -> int:
    """128-byte passes through the SM's one load and store unit, without bank conflicts (the emulator counts those)."""
    if instruction.mnemonic == "LDSM":
        matrices = re.search(r"\.([124])\b", instruction.opcode)
        return int(matrices[1]) if matrices else 1
    width = re.search(r"\.(64|128)\b", instruction.opcode)
    return int(width[1]) // 32 if width else 1


def estimate(code: MachineCode, launched: Launched, chip: Chip) -> Estimate:
    """The most that a kernel can reach on a chip."""
    blocks = resident_blocks(chip, code.registers, launched.threads, launched.shared_bytes)
    warps = launched.threads // 32
    cycles = pipe_cycles(code.main_loop(), chip, launched.refreshed, launched.inner_passes)
    passes_a_second = chip.clock * _QUARTERS / (max(cycles.values()) * warps)
    pipe = launched.pass_bytes * passes_a_second * chip.multiprocessors
    flight = blocks * launched.flight_bytes * chip.multiprocessors / DRAM_LATENCY
    return Estimate(
        blocks=blocks,
        occupancy=blocks * warps / chip.warps,
        cycles=cycles,
        pipe_bandwidth=pipe,
        flight_bandwidth=flight,
        share=min(1.0, pipe / chip.bandwidth, flight / chip.bandwidth),
    )
