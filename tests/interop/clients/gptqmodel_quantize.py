"""Quantize a model with GPTQModel, several times. Arguments: MODEL CASES OUT.

CASES is a JSON object of names and arguments of GPTQModel's ``GPTQConfig``. OUT/NAME becomes the build, OUT/NAME.dense
a safetensors file of what GPTQModel's own layer makes of every quantized weight, float32 [out_features, in_features]:
the stored float16 scales times exact integers.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization.config import GPTQConfig
from safetensors.torch import save_file
from torch import Tensor


def main(source: str, cases: str, out: str) -> None:
    ids = torch.randint(3, 2048, (4, 64), generator=torch.Generator().manual_seed(0))
    calibration = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    os.chdir(out)  # it leaves a folder of logs where it runs
    for name, settings in json.loads(cases).items():
        config = GPTQConfig(**{"bits": 4, "group_size": 32, "device": "cpu", **settings})
        model = GPTQModel.load(source, config, dtype=torch.bfloat16)
        model.quantize(calibration, batch_size=1, backend=BACKEND.GPTQ_TORCH)
        model.save(str(Path(out) / name))
        save_file(dequantized(Path(out) / name), Path(out) / f"{name}.dense")


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
