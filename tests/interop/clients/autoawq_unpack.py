"""Unpack every quantized linear of an AWQ build with AutoAWQ's own functions. Arguments: BUILD ANSWER.

The answer holds, for each linear, ``codes`` and ``zero_points`` (uint8), ``float16`` and ``float32``: the weight as
AutoAWQ computes it from the stored float16 scales and from the same scales as float32. All are [out_features, ...].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from awq.utils.packing_utils import dequantize_gemm, reverse_awq_order, unpack_awq
from safetensors.torch import load_file, save_file
from torch import Tensor


def main(build: str, answer: str) -> None:
    quantization = json.loads((Path(build) / "config.json").read_text())["quantization_config"]
    bits, group_size = quantization["bits"], quantization["group_size"]
    tensors: dict[str, Tensor] = {}
    for shard in Path(build).glob("*.safetensors"):
        tensors |= load_file(shard)

    unpacked: dict[str, Tensor] = {}
    for module in sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")):
        packed = tensors[f"{module}.qweight"], tensors[f"{module}.qzeros"]
        scales = tensors[f"{module}.scales"]
        codes, zero_points = reverse_awq_order(*unpack_awq(*packed, bits), bits)
        mask = 2**bits - 1  # AutoAWQ's shifts drag the sign along; its dequantize_gemm masks like this
        unpacked[f"{module}.codes"] = (codes & mask).to(torch.uint8)
        unpacked[f"{module}.zero_points"] = (zero_points & mask).to(torch.uint8)
        unpacked[f"{module}.float16"] = dequantize_gemm(*packed, scales, bits, group_size)
        unpacked[f"{module}.float32"] = dequantize_gemm(*packed, scales.float(), bits, group_size)
    save_file({name: tensor.t().contiguous() for name, tensor in unpacked.items()}, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
