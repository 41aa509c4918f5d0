"""Unpack every quantized linear of a GPTQ build with AutoGPTQ's own layer. Arguments: BUILD ANSWER.

The answer holds, for each linear, ``float16`` and ``float32``: the weight [out_features, in_features] as AutoGPTQ
computes it from the stored float16 scales and from the same scales as float32.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def qlinear_cuda() -> ModuleType:
    """AutoGPTQ's module of that name, by its path: the package as a whole does not import under this transformers."""
    path = importlib.metadata.distribution("auto-gptq").locate_file("auto_gptq/nn_modules/qlinear/qlinear_cuda.py")
    spec = importlib.util.spec_from_file_location("qlinear_cuda", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(build: str, answer: str) -> None:
    quantization = json.loads((Path(build) / "config.json").read_text())["quantization_config"]
    tensors: dict[str, Tensor] = {}
    for shard in Path(build).glob("*.safetensors"):
        tensors |= load_file(shard)

    layer_class = qlinear_cuda().QuantLinear
    unpacked: dict[str, Tensor] = {}
    for module in sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")):
        own = {part: tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
        if quantization["checkpoint_format"] == "gptq_v2":
            own["qzeros"] = to_v1(own["qzeros"], quantization["bits"])
        in_features, out_features = len(own["g_idx"]), own["scales"].shape[1]
        layer = layer_class(quantization["bits"], quantization["group_size"], in_features, out_features, bias=False)
        layer.load_state_dict(own)
        for dtype in (torch.float16, torch.float32):
            unpacked[f"{module}.{str(dtype).removeprefix('torch.')}"] = weight_of(layer, dtype)
    save_file(unpacked, answer)


def to_v1(qzeros: Tensor, bits: int) -> Tensor:
    """AutoGPTQ knows v1 alone, whose zero points are less by one. None may be 0: nothing is borrowed then."""
    words = 3 if bits == 3 else 1  # 32 values of 3 bits run through three words
    ones = sum(1 << shift for shift in range(0, 32 * words, bits))
    rows = []
    for row in qzeros.tolist():
        streams = [row[start : start + words] for start in range(0, len(row), words)]
        values = [sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(one)) - ones for one in streams]
        rows.append([(value >> (32 * place)) & 0xFFFFFFFF for value in values for place in range(words)])
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


def weight_of(layer: Any, dtype: torch.dtype) -> Tensor:
    """What the layer multiplies by. The identity gives it back unchanged: every product is with one or zero."""
    layer.scales = layer.scales.to(dtype)
    product: Tensor = layer(torch.eye(layer.infeatures, dtype=dtype))
    return product.t().contiguous()


if __name__ == "__main__":
    main(*sys.argv[1:])
