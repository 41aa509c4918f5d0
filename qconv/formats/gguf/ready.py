"""qconv's ready mixtures: types by what each weight is and how often it is read, without a search.

``Q4_A`` (A: attention's types are high) is at most as large as llama.cpp's Q4_K_M, whatever the model's shape. A bit
more divides a squared error by four wherever it is spent, so the best bits differ by half the binary logarithm of what
a squared error costs per weight: by the leads of :data:`LEADS`, less what a weight needs that few tokens read. An
expert's is read by ``top_k / experts`` of them, a row of the embedding or head by one in the vocabulary. Types are then
the greedy solution of Lagrange's problem under the size of llama.cpp's file type. The leads are rounded means of what
``qconv sensitivity`` measured on a small mixture of experts, on the same with outliers and on a small dense model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeAlias

from gguf import GGML_QUANT_SIZES, MODEL_TENSOR, GGMLQuantizationType

from qconv.core.architecture import Architecture, Moe
from qconv.formats.gguf.names import GgufTensor

T: TypeAlias = GGMLQuantizationType

READY = {"Q2_A": "Q2_K", "Q3_A": "Q3_K_M", "Q4_A": "Q4_K_M", "Q5_A": "Q5_K_M"}
"""llama.cpp's file type than which a ready mixture is not larger."""

LEADS = {
    MODEL_TENSOR.ATTN_Q: 0.5,
    MODEL_TENSOR.ATTN_K: 1.75,
    MODEL_TENSOR.ATTN_V: 2.0,
    MODEL_TENSOR.ATTN_OUT: 1.0,
    MODEL_TENSOR.FFN_DOWN: 0.25,
    MODEL_TENSOR.FFN_DOWN_EXP: 0.25,
    MODEL_TENSOR.FFN_DOWN_SHEXP: 0.25,
    MODEL_TENSOR.TOKEN_EMBD: 8.5,
    MODEL_TENSOR.OUTPUT: 9.0,
}
"""Bits more than gate and up of a dense MLP have, of weights that every token reads."""
FIRST_LEAD = 0.75
"""Bits more in the first layer, whose errors all others pass on; none from a quarter of the layers on."""
DIVERGENCE = {T.Q2_K: 6.6, T.IQ3_S: 1.48, T.IQ4_XS: 0.60, T.Q5_K: 0.23, T.Q6_K: 0.09, T.Q8_0: 0.02}
"""What is chosen from, with the divergence x 1000 of all linears rounded to it by GPTQ (docs/evidence/quality.md)."""
_EXPERTS = (MODEL_TENSOR.FFN_GATE_EXP, MODEL_TENSOR.FFN_UP_EXP, MODEL_TENSOR.FFN_DOWN_EXP)


def lead(tensor: GgufTensor, model: Architecture) -> float:
    """The bits that a tensor's weights should have more than gate and up of a dense MLP in the middle of the model."""
    bits = LEADS.get(tensor.kind, 0.0)
    if tensor.layer is None:
        return bits - 0.5 * math.log2(tensor.rows)
    moe = model.layers[tensor.layer].mlp
    if tensor.kind in _EXPERTS and isinstance(moe, Moe):
        bits += 0.5 * math.log2(moe.top_k / len(moe.experts))
    return bits + FIRST_LEAD * max(0.0, 1.0 - 4.0 * tensor.layer / len(model.layers))


def ready_types(
    model: Architecture, tensors: Sequence[GgufTensor], size: Callable[[GgufTensor, T], int], budget: int
) -> dict[str, T]:
    """The types of a ready mixture, by name.

    Args:
        model: The architecture.
        tensors: Those that are quantized.
        size: Bytes of a tensor whose wanted type is that.
        budget: Bytes for all of them; where even the smallest types need more, those are taken.
    """
    ladder = sorted(DIVERGENCE, key=lambda type: GGML_QUANT_SIZES[type][1] / GGML_QUANT_SIZES[type][0])
    chosen = {tensor.name: 0 for tensor in tensors}
    left = budget - sum(size(tensor, ladder[0]) for tensor in tensors)
    steps = []
    for tensor in tensors:
        worth = 4.0 ** lead(tensor, model) * tensor.numel
        for at, (lower, higher) in enumerate(pairwise(ladder), start=1):
            more = size(tensor, higher) - size(tensor, lower)
            gain = worth * (DIVERGENCE[lower] - DIVERGENCE[higher])
            steps.append((gain / more if more else math.inf, -at, tensor, more))
    # The ladder is convex: of one tensor the lower step is always worth more. Earlier tensors win a tie.
    for _, at, tensor, more in sorted(steps, key=lambda step: (-step[0], -step[1])):
        if chosen[tensor.name] == -at - 1 and more <= left:
            chosen[tensor.name], left = -at, left - more
    return {name: ladder[at] for name, at in chosen.items()}
