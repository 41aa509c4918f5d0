"""The GPUs that the static model knows, from public specifications; nothing here was measured by us.

Sources: NVIDIA's data sheets (SMs, boost clock, memory bandwidth); CUDA C++ Programming Guide, "Arithmetic
Instructions" (lanes a cycle) and "Technical Specifications per Compute Capability" (shared memory, warps). Tensor rates
follow from the data sheets' dense f16 rates with f32 sums, but on sm_90 and sm_100, where ``mma.sync`` is taken to
reach 62 % of wgmma's rate ("Benchmarking and Dissecting the Nvidia Hopper GPU Architecture", arXiv 2402.13499).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chip:
    """One GPU.

    Attributes:
        name: As it is sold.
        arch: Compute capability times ten.
        multiprocessors: SMs enabled.
        clock: Boost clock, Hz.
        bandwidth: DRAM, bytes a second.
        shared_bytes: Shared memory of an SM.
        warps: Resident warps of an SM at most.
        hmma_cycles: Cycles of an SM quarter for one m16n8k16 of halves with f32 sums.
        fma_lanes: Lanes a cycle and SM of f32 multiply-add.
        half2_lanes: The same of two halves.
    """

    name: str
    arch: int
    multiprocessors: int
    clock: float
    bandwidth: float
    shared_bytes: int
    warps: int
    hmma_cycles: float
    fma_lanes: int
    half2_lanes: int


REGISTERS = 65536
"""32-bit registers of an SM."""
BLOCKS = {80: 32, 89: 24, 90: 32, 100: 32, 120: 24}
"""Resident blocks of an SM at most."""
INTEGER_LANES = 64
"""Lanes a cycle and SM of logic, shifts, integer sums and products: on every chip here, at least."""
DRAM_LATENCY = 800e-9
"""Seconds from a load's issue to its data on a loaded memory system; published microbenchmarks give 500 to 900 ns."""
RESERVED_SHARED = 1024
"""Bytes of shared memory that the system takes from every block, sm_80 and later."""

A100 = Chip("A100", 80, 108, 1.41e9, 2.039e12, 164 << 10, 64, 8.0, 64, 128)
L40S = Chip("L40S", 89, 142, 2.52e9, 0.864e12, 100 << 10, 48, 16.0, 128, 64)
H100 = Chip("H100", 90, 132, 1.755e9, 3.35e12, 228 << 10, 64, 6.4, 128, 128)
B200 = Chip("B200", 100, 148, 1.85e9, 8.0e12, 228 << 10, 64, 6.4, 128, 128)
RTX_PRO_6000 = Chip("RTX PRO 6000", 120, 188, 2.6e9, 1.792e12, 100 << 10, 48, 16.0, 128, 64)

CHIPS = {chip.arch: chip for chip in (A100, L40S, H100, B200, RTX_PRO_6000)}
"""By architecture: one chip for each target that the kernels are compiled for."""
