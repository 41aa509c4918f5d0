"""Load a checkpoint with transformers and decode greedily in float32.

Arguments: MODEL WEIGHT_DTYPE REQUEST ANSWER [rounded]. WEIGHT_DTYPE is the type in which weights are loaded or, in a
quantized checkpoint, dequantized; with ``rounded`` compressed-tensors rounds inputs, keys and values as the checkpoint
says, without it weights alone are quantized.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.interop.clients import decoding


def main(model_folder: str, weight_dtype: str, request: str, answer: str, rounded: str = "") -> None:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=getattr(torch, weight_dtype), output_loading_info=True
    )
    model, loading = loaded
    model.eval()
    model(torch.tensor([[0]]))  # compressed-tensors dequantizes attention only at the first forward pass
    if not rounded:
        leave_activations(model)
    decoding.compute_in_float32(model)
    problems = {kind: sorted(map(str, names)) for kind, names in loading.items()}
    decoding.answer(Path(request), Path(answer), model, problems)


def leave_activations(model: Any) -> None:
    """Keep compressed-tensors from rounding inputs, as FP8 asks for: what is compared are weights."""
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            module.quantization_enabled = False


if __name__ == "__main__":
    main(*sys.argv[1:])
