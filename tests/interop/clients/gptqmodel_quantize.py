"""Quantize a model with GPTQModel, several times. Arguments: MODEL CASES OUT.

CASES is a JSON object of names and arguments of GPTQModel's ``GPTQConfig`` or, with ``method: awq``, ``AWQConfig``.
OUT/NAME becomes the build, OUT/NAME.dense a safetensors file of what GPTQModel's own code makes of every quantized
weight, float32 [out_features, in_features]: the stored float16 scales times exact integers.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.quantization.config import AWQConfig, GPTQConfig
from safetensors.torch import load_file, save_file
from torch import Tensor


def main(source: str, cases: str, out: str) -> None:
    ids = torch.randint(3, 2048, (4, 64), generator=torch.Generator().manual_seed(0))
    calibration = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    os.chdir(out)  # it leaves a folder of logs where it runs
    for name, settings in json.loads(cases).items():
        awq = settings.get("method") == "awq"
        config = (AWQConfig if awq else GPTQConfig)(**{"bits": 4, "group_size": 32, "device": "cpu", **settings})
        model = GPTQModel.load(source, config, dtype=torch.bfloat16)
        model.quantize(calibration, batch_size=1, **({} if awq else {"backend": BACKEND.GPTQ_TORCH}))
        model.save(str(Path(out) / name))
        save_file((dequantized_awq if awq else dequantized)(Path(out) / name), Path(out) / f"{name}.dense")


def dequantized_awq(build: Path) -> dict[str, Tensor]:
    """Every quantized weight as GPTQModel's function for AWQ's words computes it."""
    tensors: dict[str, Tensor] = {}
    for shard in build.glob("*.safetensors"):
        tensors |= load_file(shard)
    weights = {}
    for module in (name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")):
        packed = tensors[f"{module}.qweight"], tensors[f"{module}.qzeros"]
        scales = tensors[f"{module}.scales"].float()
        group_size = len(packed[0]) // len(scales)
        weights[f"{module}.weight"] = dequantize_gemm(*packed, scales, 4, group_size).t().contiguous()
    return weights


def dequantized(build: Path) -> dict[str, Tensor]:
    """Every quantized weight as GPTQModel computes it, from float32 copies of the scales."""
    model: Any = GPTQModel.load(str(build), device="cpu", backend=BACKEND("torch"), dtype=torch.float16).model
    weights: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if hasattr(module, "dequantize_weight"):
            module.scales = module.scales.float()
            weights[f"{name}.weight"] = module.dequantize_weight().t().contiguous()
    return weights


if __name__ == "__main__":
    main(*sys.argv[1:])
