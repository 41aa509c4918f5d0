"""Quantize a model with AutoAWQ, several times. Arguments: MODEL CASES OUT.

CASES is a JSON object of names and what is different about AutoAWQ's ``quant_config``. OUT/NAME becomes the build,
OUT/NAME.dense a safetensors file of what AutoAWQ's own function makes of every quantized weight of a ``GEMM`` build,
float32 [out_features, in_features], from float32 copies of the scales.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import awq.models.base
import awq.modules.linear.gemm
import awq.quantize.quantizer
import torch
from awq import AutoAWQForCausalLM
from awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import load_file, save_file
from torch import Tensor

awq.models.base.get_best_device = lambda: "cpu"
awq.quantize.quantizer.get_best_device = lambda: "cpu"
awq.modules.linear.gemm.TRITON_AVAILABLE = False

BITS, GROUP_SIZE = 4, 32


def main(source: str, cases: str, out: str) -> None:
    ids = torch.randint(3, 2048, (8, 64), generator=torch.Generator().manual_seed(0)).tolist()
    for name, settings in json.loads(cases).items():
        model: Any = AutoAWQForCausalLM.from_pretrained(
            source, torch_dtype=torch.float32, device_map={"": "cpu"}, low_cpu_mem_usage=True, use_cache=False
        )
        config = {"zero_point": True, "q_group_size": GROUP_SIZE, "w_bit": BITS, "version": "GEMM", **settings}
        model.quantize(None, quant_config=config, calib_data=ids, max_calib_seq_len=64)
        model.save_quantized(str(Path(out) / name))
        if config["version"] == "GEMM":
            save_file(dequantized(Path(out) / name), Path(out) / f"{name}.dense")


def dequantized(build: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for shard in build.glob("*.safetensors"):
        tensors |= load_file(shard)
    weights = {}
    for module in (name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")):
        packed = tensors[f"{module}.qweight"], tensors[f"{module}.qzeros"]
        weight = dequantize_gemm(*packed, tensors[f"{module}.scales"].float(), BITS, GROUP_SIZE)
        weights[f"{module}.weight"] = weight.t().contiguous()
    return weights


if __name__ == "__main__":
    main(*sys.argv[1:])
