"""Load a ``quant_method: fp8`` build with transformers, dequantized on the CPU. Arguments: BUILD DTYPE ANSWER.

The answer holds every tensor of the loaded model in DTYPE, the fused experts taken apart again under the names that
checkpoints give them, and in its metadata what loading reports.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config


def main(build: str, dtype: str, answer: str) -> None:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        build,
        dtype=getattr(torch, dtype),
        quantization_config=FineGrainedFP8Config(dequantize=True),
        output_loading_info=True,
    )
    model, loading = loaded
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        tensors |= dict(apart(name, tensor))
    problems = {kind: sorted(map(str, names)) for kind, names in loading.items()}
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, answer, metadata={"loading": json.dumps(problems)}
    )


def apart(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """The weights of single experts that a fused tensor [experts, out, in] is made of; gate lies above up."""
    module, _, leaf = name.rpartition(".")
    if leaf not in ("gate_up_proj", "down_proj"):
        return [(name, tensor)]
    parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
    return [
        (f"{module}.{expert}.{part}.weight", weight)
        for expert, fused in enumerate(tensor)
        for part, weight in zip(parts, fused.chunk(len(parts)), strict=True)
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
