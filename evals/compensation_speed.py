"""What compensation costs on any grid beside GPTQ on int4, for one true expert of the 480B: processor time and memory.

An expert's gate and up [2560, 6144] share the second moments of 13,000 tokens, down [6144, 2560] has its own. All that
an expert takes is counted: second moments, their factors, the grid's own rounding, compensation, refinement, packing
and the errors that say that nothing became worse. Weights and inputs are random, the inputs correlated.

Each way runs in a process of its own on one thread, in turns, and the best turn of each counts: what else the machine
does can only make a turn longer. Memory is the peak of what is resident beyond what was before: tokens and weights.

Exits with 1 if a way that must be fast enough is not.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from qconv.calibration.statistics import InputStatistics
from qconv.core.grid import FittedGrid
from qconv.core.hessian import factorize
from qconv.core.qtensor import Grid
from qconv.core.settings import GptqSettings, RefineSettings
from qconv.grids.blocks import BlockGrid
from qconv.grids.elements import E4M3Grid
from qconv.grids.fp4 import Mxfp4Grid, Nvfp4Grid
from qconv.grids.ggml import GgmlType
from qconv.methods import gptq
from qconv.methods.compensated.problem import Problem

TOKENS, HIDDEN, WIDTH = 13_000, 6144, 2560
BASELINE = "int4 gptq"
LIMITS = {"Q4_K": 1.3}
"""Times of the baseline's, at most."""
_SWEEP, _REFIT = " + sweep", " + refit"


@dataclass(frozen=True, slots=True)
class Turn:
    """One expert.

    Attributes:
        moments: Seconds of processor time for second moments.
        rounding: For all else.
        peak: Bytes.
        error: ``trace(d H d^T)`` of the three linears as a share of the grid's own rounding.
    """

    moments: float
    rounding: float
    peak: int
    error: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.moments + self.rounding


@click.command(help=__doc__)
@click.option("--way", "ways", multiple=True, default=("Q4_K",), show_default=True, help="A grid, + sweep, + refit.")
@click.option("--turns", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--tokens", type=click.IntRange(min=1), default=TOKENS, show_default=True)
@click.option("--one", help="For the processes that this one starts: run one turn and print it.")
def main(ways: tuple[str, ...], turns: int, tokens: int, one: str | None) -> None:
    if one is not None:
        click.echo(json.dumps(asdict(turn(one, tokens))))
        return
    best: dict[str, Turn] = {}
    for _ in range(turns):
        for way in (BASELINE, *ways):
            found = in_a_process(way, tokens)
            best[way] = min((found, best.get(way, found)), key=lambda one: one.seconds)
    click.echo("| way | second moments, s | all else, s | times of int4 gptq | peak MB | error / own |")
    click.echo("|---|--:|--:|--:|--:|--:|")
    slow = False
    for way, found in best.items():
        ratio = found.seconds / best[BASELINE].seconds
        slow = slow or ratio > LIMITS.get(way, float("inf"))
        click.echo(
            f"| {way} | {found.moments:.1f} | {found.rounding:.1f} | {ratio:.2f} | {found.peak / 1e6:.0f} | "
            f"{found.error:.3f} |"
        )
    sys.exit(slow)


def in_a_process(way: str, tokens: int) -> Turn:
    """A turn that shares nothing with others."""
    command = [sys.executable, __file__, "--one", way, "--tokens", str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Turn(**json.loads(done.stdout))


def turn(way: str, tokens: int) -> Turn:
    """Round one expert in this process."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    inputs = {"gate": _inputs(tokens, HIDDEN, generator), "down": _inputs(tokens, WIDTH, generator)}
    weights = {
        name: torch.randn(rows, columns, generator=generator) * 0.02
        for name, (rows, columns) in {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}.items()
    }
    before = _forget_peak()
    moments = rounding = error = own = 0.0
    for source, names in (("gate", ("gate", "up")), ("down", ("down",))):
        start = time.process_time()
        statistics = InputStatistics.empty(inputs[source].shape[1], inputs[source].shape[1])
        statistics.update(inputs[source])
        middle = time.process_time()
        for found, nearest in _round(way, statistics.hessian, [weights[name] for name in names]):
            error, own = error + found, own + nearest
        moments += middle - start
        rounding += time.process_time() - middle
    return Turn(moments, rounding, _resident("VmHWM") - before, error / own)


def _round(way: str, hessian: Tensor, weights: list[Tensor]) -> list[tuple[float, float]]:
    """Errors and those of plain rounding."""
    settings = GptqSettings()
    if way == BASELINE:
        factor = factorize(hessian, settings)
        grid = Grid(4, 128, True, torch.float16)
        results = [gptq.quantize(weight, grid, hessian, settings, None, factor) for weight in weights]
        return [(result.error, result.rtn_error) for result in results]
    name = way.removesuffix(_SWEEP).removesuffix(_REFIT)
    refine = RefineSettings(sweeps=int(name != way), refits=int(way.endswith(_REFIT)))
    problem = Problem(hessian, settings, refine, {})
    rounded = [problem.quantize(weight, fitted(name)) for weight in weights]
    return [(one.error, one.own_error) for one in rounded]


def fitted(name: str) -> FittedGrid[Any]:
    """A grid by its name."""
    others: dict[str, FittedGrid[Any]] = {
        "NVFP4": Nvfp4Grid(),
        "MXFP4": Mxfp4Grid(),
        "E4M3": E4M3Grid(Grid(8, 128, True, torch.bfloat16, "e4m3", 128)),
    }
    return others[name] if name in others else BlockGrid(GgmlType[name])


def _inputs(tokens: int, columns: int, generator: torch.Generator) -> Tensor:
    """Correlated, of different sizes: float32 [tokens, columns]."""
    inputs = torch.randn(tokens, columns, generator=generator)
    inputs.addmm_(
        torch.randn(tokens, 64, generator=generator), torch.randn(64, columns, generator=generator), alpha=0.3
    )
    return inputs.mul_(0.5 + torch.rand(columns, generator=generator) * 3.0)


def _forget_peak() -> int:
    """Let the peak be what is resident now, and give that."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(key: str) -> int:
    """Bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
