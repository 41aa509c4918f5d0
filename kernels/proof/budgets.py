"""What the compiler makes of every kernel, held against kernels/budgets.yaml.

``python -m kernels.proof.budgets`` prints what differs; with ``--write`` it rewrites the file.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from kernels.proof.chips import CHIPS
from kernels.proof.interpreter import memory_of
from kernels.proof.launcher import PtxLauncher
from kernels.proof.memory import Traffic
from kernels.proof.model import Launched, estimate, resident_blocks
from kernels.proof.sass import MachineCode, read_cubin
from qconv.runtime.backends.cuda.cache import cached_cubin
from qconv.runtime.backends.cuda.products import HELPERS, Rows, multiply
from qconv.runtime.backends.cuda.sources import source_of
from qconv.runtime.kernel_interface import (
    ACTIVATIONS,
    HELPER_THREADS,
    ROW_TILES,
    STAGES,
    TILE_BYTES,
    TILE_COLUMNS,
    TILE_DEPTH,
    KernelWeight,
    entry_name,
    shared_bytes,
    threads,
)

PATH = Path(__file__).parents[1] / "budgets.yaml"
CACHE = Path(__file__).parents[2] / "build" / "cubins"
ARCHITECTURES = tuple(CHIPS)
GROUP = 128
"""Inputs of a group, where the layout leaves it open: what AWQ and GPTQ builds have as a rule."""
_COLUMNS, _TILES = 2 * TILE_COLUMNS, 16
"""The weight on which traffic is counted; shares do not depend on its size."""


@dataclass(frozen=True, slots=True)
class Build:
    """One kernel for one architecture.

    Attributes:
        registers: 32-bit registers a thread.
        spill_bytes: Local memory a thread.
        warps: Resident warps of an SM.
        dram: The share of the chip's DRAM bandwidth that the static model allows; None for a kernel without main loop.
        bound: What the model says limits it.
    """

    registers: int
    spill_bytes: int
    warps: int
    dram: float | None = None
    bound: str = ""


@dataclass(frozen=True, slots=True)
class Bytes:
    """What a product moves between global memory and the SMs, for a full tile of rows.

    Attributes:
        moved: Bytes that threads read and wrote; what is read more than once mostly comes from L2.
        compulsory: Bytes that were read or written at least once.
        weights: Bytes of codes and parameters for each 64 inputs of 128 outputs.
    """

    moved: int
    compulsory: int
    weights: float

    @property
    def ratio(self) -> float:
        """Moved over compulsory."""
        return self.moved / self.compulsory


def entries(layout: str) -> Iterator[tuple[str, int, torch.dtype]]:
    """Name, rows and activations of a layout's products."""
    for rows in ROW_TILES:
        for activations in ACTIVATIONS:
            yield entry_name(layout, rows, activations), rows, activations


def measure(layout: str, architecture: int) -> dict[str, Build]:
    """Compile a layout's products, or the helpers, and look at the machine code.

    Raises:
        BackendError: it does not compile, or NVIDIA's disassembler is missing.
    """
    codes = read_cubin(cached_cubin(source_of(layout), architecture, folder=CACHE))
    if layout == HELPERS:
        return {name: _plain(code, architecture) for name, code in sorted(codes.items())}
    return {
        name: _product(codes[name], layout, rows, weight_bytes(layout), architecture)
        for name, rows, _ in entries(layout)
    }


def _plain(code: MachineCode, architecture: int) -> Build:
    blocks = resident_blocks(CHIPS[architecture], code.registers, HELPER_THREADS, 0)
    return Build(code.registers, code.stack_bytes, blocks * HELPER_THREADS // 32)


def _product(code: MachineCode, layout: str, rows: int, tile_bytes: float, architecture: int) -> Build:
    loop = code.main_loop()
    tiles = sum(each.mnemonic == "BAR" for each in loop)
    # A tile is 4 products of 16 x 8 x 16 for each row of a block; what is missing in a warp's, an inner loop repeats.
    warps = threads(rows) // 32
    products = sum(each.mnemonic == "HMMA" for each in loop) * warps
    launched = Launched(
        threads=threads(rows),
        shared_bytes=shared_bytes(layout, rows),
        pass_bytes=tiles * tile_bytes,
        flight_bytes=(STAGES - 1) * tile_bytes,
        refreshed=refreshed(layout, rows),
        inner_passes=max(1, round(tiles * 4 * rows / products)),
    )
    answer = estimate(code, launched, CHIPS[architecture])
    return Build(code.registers, code.stack_bytes, answer.blocks * warps, round(answer.share, 3), answer.bound)


def refreshed(layout: str, rows: int) -> float:
    """In which share of the slabs of 32 inputs that a warp goes through a group, or super-block, begins.

    For 16 and 32 rows four warps share a tile's slabs; else each goes through all of them. Super-blocks are looked for
    once a tile.
    """
    if layout in ("q4_k", "q6_k"):
        return TILE_DEPTH / 256
    inputs = TILE_DEPTH if rows in (16, 32) else TILE_DEPTH // 2
    return min(1.0, inputs / {"awq": GROUP, "int4": GROUP, "fp8": 128}.get(layout, 32))


_LAUNCHERS: dict[int, PtxLauncher] = {}
_WEIGHTS: dict[str, float] = {}


def traffic(layout: str, rows: int, activations: torch.dtype) -> Bytes:
    """Interpret a product's PTX and count its accesses; the weights' values do not matter."""
    launcher = _LAUNCHERS.setdefault(80, PtxLauncher(80, multiprocessors=0))  # nothing to fill: one slice
    launcher.traffic = Traffic()
    depth = _TILES * TILE_DEPTH
    zeros = [torch.zeros(_COLUMNS * depth * 2, dtype=torch.uint8) for _ in range(4)]
    weight = KernelWeight(
        layout,
        _COLUMNS,
        depth,
        zeros[0],
        scales=zeros[1],
        offsets=zeros[2],
        weights_high=zeros[3],
        group_shift=GROUP.bit_length() - 1,
    )
    multiply(launcher, weight, torch.zeros(rows, depth, dtype=activations), Rows(rows, 1, rows))
    counted = launcher.traffic
    compulsory = sum(16 * int(pieces.sum()) for pieces in counted.touched.values())
    of_weight = sum(counted.compulsory(memory_of(tensor)) for tensor in zeros)
    launcher.traffic = None
    return Bytes(counted.moved, compulsory, of_weight / _TILES / (_COLUMNS // TILE_COLUMNS))


def weight_bytes(layout: str) -> float:
    """DRAM bytes of 64 inputs of 128 outputs."""
    if layout not in _WEIGHTS:
        _WEIGHTS[layout] = traffic(layout, ROW_TILES[0], torch.float16).weights
    return _WEIGHTS[layout]


def layouts() -> tuple[str, ...]:
    """The translation units: one for each weight layout, and the helpers."""
    return (*TILE_BYTES, HELPERS)


# ---- the file


@dataclass(frozen=True, slots=True)
class Budget:
    """What the file grants a kernel.

    Attributes:
        ratio: Bytes moved over compulsory bytes, at most; None for a helper.
        builds: By architecture.
    """

    ratio: float | None
    builds: dict[int, Build]


def read() -> dict[str, Budget]:
    """The committed budgets by kernel."""
    document: dict[str, Any] = yaml.safe_load(PATH.read_text())
    return {
        name: Budget(
            values.pop("moved_over_compulsory", None),
            {int(re.sub(r"\D", "", target)): Build(**build) for target, build in values.items()},
        )
        for name, values in document["kernels"].items()
    }


def exceeded(name: str, architecture: int, build: Build, budget: Budget | None) -> list[str]:
    """In what a build is worse than its budget, in words."""
    if budget is None or architecture not in budget.builds:
        return [f"{name} has no budget for sm_{architecture}"]
    granted = budget.builds[architecture]
    worse = []
    if build.registers > granted.registers:
        worse.append(f"{build.registers} registers, budget {granted.registers}")
    if build.spill_bytes > granted.spill_bytes:
        worse.append(f"{build.spill_bytes} bytes of local memory, budget {granted.spill_bytes}")
    if build.warps < granted.warps:
        worse.append(f"{build.warps} resident warps, budget {granted.warps}")
    if build.dram is not None and granted.dram is not None and build.dram < granted.dram - 0.005:
        worse.append(f"{build.dram:.1%} of DRAM bandwidth in the model, budget {granted.dram:.1%}")
    return [f"{name}, sm_{architecture}: {reason}" for reason in worse]


def measured() -> dict[str, Budget]:
    """What the kernels are now. Compiles all of them: minutes, where nothing is cached."""
    ratios = {
        name: round(traffic(layout, rows, activations).ratio, 3)
        for layout in TILE_BYTES
        for name, rows, activations in entries(layout)
    }
    builds: dict[str, dict[int, Build]] = {}
    for layout in layouts():
        for architecture in ARCHITECTURES:
            for name, build in measure(layout, architecture).items():
                builds.setdefault(name, {})[architecture] = build
    return {name: Budget(ratios.get(name), values) for name, values in builds.items()}


def text(budgets: dict[str, Budget]) -> str:
    """The file's content."""
    lines = [
        "# What every kernel may use at most: registers, resident warps and traffic are held by the tests.",
        "# dram: the share of DRAM bandwidth that the static model allows. Nothing here was measured on a GPU.",
        "# Rewrite with: python -m kernels.proof.budgets --write",
        "kernels:",
    ]
    for name, budget in budgets.items():
        lines.append(f"  {name}:")
        if budget.ratio is not None:
            lines.append(f"    moved_over_compulsory: {budget.ratio}")
        for architecture, build in budget.builds.items():
            values = f"registers: {build.registers}, spill_bytes: {build.spill_bytes}, warps: {build.warps}"
            if build.dram is not None:
                values += f", dram: {build.dram}, bound: {build.bound}"
            lines.append(f"    sm_{architecture}: {{{values}}}")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Print differences, or write the file."""
    now = text(measured())
    before = PATH.read_text() if PATH.exists() else ""
    if arguments == ["--write"]:
        PATH.write_text(now)
    old, new = before.splitlines(), now.splitlines()
    for line in [f"- {line}" for line in old if line not in new] + [f"+ {line}" for line in new if line not in old]:
        print(line)
    return int(now != before and arguments != ["--write"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
