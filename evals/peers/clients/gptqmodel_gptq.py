"""Quantize a model with GPTQModel's GPTQ. Arguments: MODEL TOKENS OUT OPTIONS.

TOKENS is a safetensors file with ``ids`` [sequences, length], OPTIONS a JSON object: ``all_experts``, all else are
arguments of GPTQModel's ``GPTQConfig``. Attention and every expert are quantized to 4 bits by groups of 128, symmetric;
routers and the head are not.
"""

from __future__ import annotations

import json
import sys

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization.config import ExpertsRoutingBypass, GPTQConfig, MoEConfig
from safetensors.torch import load_file


def main(source: str, tokens: str, out: str, options: str) -> None:
    settings = json.loads(options)
    routing = MoEConfig(ExpertsRoutingBypass()) if settings.pop("all_experts", False) else None
    ids = load_file(tokens)["ids"].long()
    config = GPTQConfig(bits=4, group_size=128, sym=True, desc_act=False, device="cpu", moe=routing, **settings)
    model = GPTQModel.load(source, config, dtype=torch.bfloat16)
    calibration = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    model.quantize(calibration, batch_size=1, backend=BACKEND.GPTQ_TORCH)
    model.save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
