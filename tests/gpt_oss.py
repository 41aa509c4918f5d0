"""A small model as gpt-oss's are published: experts of a layer in one tensor of blocks and one of scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import random_model, save_model
from tests.gguf_families import YARN

EXPERTS = 4
SIZES: dict[str, Any] = {
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "intermediate_size": 96,
    "sliding_window": 16,
    "rope_parameters": YARN,
}
SECTION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
"""Of openai/gpt-oss-20b's config.json."""


def dense(folder: Path) -> Path:
    """The model in bf16."""
    return save_model(random_model("gpt_oss", **SIZES), folder)


def published(folder: Path) -> Path:
    """The same with every code and random scales in its experts."""
    dense(folder)
    generator = torch.Generator().manual_seed(1)
    for file in folder.glob("*.safetensors"):
        tensors: dict[str, Tensor] = {}
        for name, tensor in load_file(file).items():
            if not name.endswith(("gate_up_proj", "down_proj")):
                tensors[name] = tensor
                continue
            experts, columns, rows = tensor.shape  # transformers' plain ones are transposed
            shape = (experts, rows, columns // 32)
            codes = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(118, 126, shape, generator=generator, dtype=torch.uint8)
            tensors |= {f"{name}_blocks": codes, f"{name}_scales": scales}
        save_file(tensors, file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").unlink()
    whole: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        whole |= load_file(file)
        file.unlink()
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": SECTION}))
    return folder


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's files."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found
