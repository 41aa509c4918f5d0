"""GPTQ of one expert by llm-compressor's own functions, as its ``GPTQModifier`` calls them. Argument: ANSWER.

The modifier keeps a Hessian for each linear, so gate's and up's, which are equal, are both accumulated and factored.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.modifiers.gptq.helpers import accumulate_hessian, make_empty_hessian, prepare_batch
from torch import Tensor

from evals.peers.clients import expert
from evals.peers.clients.expert import Record

ARGUMENTS = QuantizationArgs(
    num_bits=expert.BITS, group_size=expert.GROUP_SIZE, symmetric=True, strategy="group", actorder="static"
)


def main(answer: str) -> None:
    given = expert.make()
    phases = {"second moments": 0.0, "quantization": 0.0}
    started, cpu = time.perf_counter(), time.process_time()
    with torch.no_grad():
        quantized = {
            "gate": quantize(given.gate, given.inputs, phases),
            "up": quantize(given.up, given.inputs, phases),
            "down": quantize(given.down, given.inner, phases),
        }
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    Record(seconds, cpu, phases, expert.peak_memory(), expert.errors(given, quantized)).write(Path(answer))


def quantize(weight: Tensor, inputs: Tensor, phases: dict[str, float]) -> Tensor:
    """Quantized and dequantized, float32 [out_features, in_features]; adds the time taken to ``phases``."""
    started = time.perf_counter()
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    hessian, samples = make_empty_hessian(module, torch.device("cpu")), torch.zeros(())
    for window in expert.windows(inputs):
        hessian, samples = accumulate_hessian(window, module, hessian, samples)
    accumulated = time.perf_counter()
    phases["second moments"] += accumulated - started
    grouped = weight.view(len(weight), -1, expert.GROUP_SIZE)
    scale, zero_point = calculate_qparams(grouped.amin(-1), grouped.amax(-1), ARGUMENTS)
    parameters = {"scale": scale, "zero_point": zero_point, "global_scale": None}
    hessians = {module: hessian}
    del hessian
    stacked = prepare_batch([module], [parameters], hessians, {module: samples})
    arguments = (*stacked, ARGUMENTS, expert.BLOCK_SIZE, expert.DAMP_PERCENT)
    del stacked
    quantized, _, _ = quantize_weight(*arguments)
    phases["quantization"] += time.perf_counter() - accumulated
    dequantized: Tensor = quantized[0]
    return dequantized


if __name__ == "__main__":
    main(*sys.argv[1:])
