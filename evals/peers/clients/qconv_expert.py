"""GPTQ of one expert by qconv, as its calibration does it. Arguments: ANSWER MODE.

MODE says how. ``workers`` is the pipeline's way: each thread has an expert of its own and one torch thread; the time is
that of all over their number. ``clipped`` is the same with a search of each group's clipping range. ``alone`` is one
expert with all torch threads, and ``profile`` as well, with kinds of operations as the parts of the time.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from evals.peers.clients import expert
from evals.peers.clients.expert import Expert, Record
from qconv.calibration.statistics import InputStatistics
from qconv.core.hessian import factorize
from qconv.core.qtensor import Grid
from qconv.core.settings import ClipSettings, GptqSettings
from qconv.executors.threads import Threads
from qconv.methods import gptq

GRID = Grid(expert.BITS, expert.GROUP_SIZE, symmetric=True, scale_dtype=torch.float16)
SETTINGS = GptqSettings(block_size=expert.BLOCK_SIZE, damp_percent=expert.DAMP_PERCENT)
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm_", "aten::addmv_"}
# torch clears the other triangle of each factor by itself, and nothing else here calls tril.
FACTORIZATIONS = {"aten::linalg_cholesky_ex", "aten::tril"}


def main(answer: str, mode: str) -> None:
    given = expert.make()
    clip = ClipSettings() if mode == "clipped" else None
    count = 1 if mode in ("alone", "profile") else torch.get_num_threads()
    started, cpu = time.perf_counter(), time.process_time()
    if mode == "alone":
        with torch.no_grad():
            quantized, phases = quantize(given, clip)
    elif mode == "profile":
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as profiled:
            quantized, _ = quantize(given, clip)
        phases = by_kind(profiled)
    else:
        with Threads(count) as workers:
            *_, (quantized, phases) = workers.map(lambda _: quantize(given, clip), range(count))
        phases = {name: value / count for name, value in phases.items()}
    seconds, cpu = (time.perf_counter() - started) / count, (time.process_time() - cpu) / count
    Record(seconds, cpu, phases, expert.peak_memory(), expert.errors(given, quantized)).write(Path(answer))


def quantize(given: Expert, clip: ClipSettings | None) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The expert's linears, quantized and dequantized, and the parts of the time."""
    phases = dict.fromkeys(("second moments", "factorization", "quantization"), 0.0)
    quantized = rounded({"gate": given.gate, "up": given.up}, given.inputs, clip, phases)
    quantized |= rounded({"down": given.down}, given.inner, clip, phases)
    return quantized, phases


def rounded(
    weights: dict[str, Tensor], inputs: Tensor, clip: ClipSettings | None, phases: dict[str, float]
) -> dict[str, Tensor]:
    """The linears that share an input, quantized and dequantized; adds the time taken to ``phases``."""
    started = time.perf_counter()
    statistics = InputStatistics.empty(inputs.shape[1], inputs.shape[1])
    for window in expert.windows(inputs):
        statistics.update(window)
    accumulated = time.perf_counter()
    hessian = statistics.hessian
    factor = factorize(hessian, SETTINGS)
    factored = time.perf_counter()
    results = {
        name: gptq.quantize(weight, GRID, hessian, SETTINGS, clip, factor).qtensor for name, weight in weights.items()
    }
    phases["second moments"] += accumulated - started
    phases["factorization"] += factored - accumulated
    phases["quantization"] += time.perf_counter() - factored
    return {name: result.dequantize() for name, result in results.items()}


def by_kind(profiled: profile) -> dict[str, float]:
    """Seconds by kind of operation."""
    seconds = {"matrix products": 0.0, "factorization": 0.0, "all else": 0.0}
    for event in profiled.key_averages():
        kind = "matrix products" if event.key in PRODUCTS else "all else"
        kind = "factorization" if event.key in FACTORIZATIONS else kind
        seconds[kind] += event.self_cpu_time_total / 1e6
    return seconds


if __name__ == "__main__":
    main(*sys.argv[1:])
