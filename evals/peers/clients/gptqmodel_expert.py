"""GPTQ of one expert by GPTQModel's ``GPTQ`` class, as its quantization loop calls it. Argument: ANSWER.

The loop lets linears that share their input share the Hessian and its factor: up takes over gate's.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from gptqmodel.quantization.config import GPTQConfig
from gptqmodel.quantization.gptq import GPTQ, SharedHessianFactorCache
from torch import Tensor

from evals.peers.clients import expert
from evals.peers.clients.expert import Record


def main(answer: str) -> None:
    given = expert.make()
    phases = {"second moments": 0.0, "quantization": 0.0}
    started, cpu = time.perf_counter(), time.process_time()
    with torch.no_grad():
        gate, up, down = task(given.gate), task(given.up), task(given.down)
        shared = SharedHessianFactorCache(generation=0, cohort="gate and up")
        for linear in (gate, up):
            linear.attach_shared_hessian_cache(shared)
        accumulate(gate, given.inputs)
        up.adopt_hessian_from(gate)
        phases["second moments"] += time.perf_counter() - started
        quantized = {"gate": quantize(gate, phases), "up": quantize(up, phases)}
        moments = time.perf_counter()
        accumulate(down, given.inner)
        phases["second moments"] += time.perf_counter() - moments
        quantized["down"] = quantize(down, phases)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    Record(seconds, cpu, phases, expert.peak_memory(), expert.errors(given, quantized)).write(Path(answer))


def task(weight: Tensor) -> GPTQ:
    """The state of one linear's quantization."""
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    config = GPTQConfig(
        bits=expert.BITS, group_size=expert.GROUP_SIZE, sym=True, desc_act=False, damp_percent=expert.DAMP_PERCENT
    )
    made = GPTQ(module, config)
    made.quantizer.configure(perchannel=True)
    return made


def accumulate(linear: GPTQ, inputs: Tensor) -> None:
    """Add tokens, float32 [tokens, in_features]."""
    for window in expert.windows(inputs):
        linear.add_batch(window, None)


def quantize(linear: GPTQ, phases: dict[str, float]) -> Tensor:
    """Quantized and dequantized, float32 [out_features, in_features]; adds the time taken to ``phases``."""
    started = time.perf_counter()
    dequantized: Tensor = linear.quantize(blocksize=expert.BLOCK_SIZE)[0]
    linear.free()
    phases["quantization"] += time.perf_counter() - started
    return dequantized


if __name__ == "__main__":
    main(*sys.argv[1:])
