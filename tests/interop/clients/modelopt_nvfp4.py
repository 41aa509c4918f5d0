"""NVFP4 by ModelOpt's own arithmetic. Arguments: BUILD ANSWER OWN.

ANSWER holds every NVFP4 weight of a build, float32 [out_features, in_features], as ModelOpt dequantizes it. OWN holds a
weight that ModelOpt has quantized itself, as the tensors of the linear ``m``, and what it dequantizes it to, ``dense``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
from safetensors.torch import load_file, save_file
from torch import Tensor


def main(build: str, answer: str, own: str) -> None:
    tensors: dict[str, Tensor] = {}
    for shard in Path(build).glob("*.safetensors"):
        tensors |= load_file(shard)
    modules = [name.removesuffix(".weight_scale_2") for name in tensors if name.endswith(".weight_scale_2")]
    save_file({module: dequantized(module, tensors) for module in modules}, answer)

    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0)) ** 3 * 0.037
    weight[3, 16:48] = 0.0
    quantized, scale, shared = NVFP4QTensor.quantize(weight.clone(), 16)
    made = {"m.weight": quantized._quantized_data, "m.weight_scale": scale, "m.weight_scale_2": shared}
    made = {name: tensor.contiguous() for name, tensor in made.items()}
    save_file(made | {"dense": dequantized("m", made)}, own)


def dequantized(module: str, tensors: dict[str, Tensor]) -> Tensor:
    packed = tensors[f"{module}.weight"]
    whole = NVFP4QTensor(torch.Size((len(packed), 2 * packed.shape[1])), torch.float32, packed)
    scales = {"scale": tensors[f"{module}.weight_scale"], "double_scale": tensors[f"{module}.weight_scale_2"]}
    dense: Tensor = whole.dequantize(torch.float32, block_sizes={-1: 16}, **scales)
    return dense.contiguous()


if __name__ == "__main__":
    main(*sys.argv[1:])
