"""FP8 checkpoints for tests, written with plain torch block by block, each with its dense twin."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconv.checkpoint.reader import INDEX_NAME

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
WHOLE = 10**9
"""More rows or columns than any weight here has."""


@dataclass(frozen=True)
class Kind:
    """How a test's FP8 checkpoint is written."""

    rows: int
    columns: int
    scale_dtype: torch.dtype
    leaf: str
    section: dict[str, Any]
    scale_dims: int = 2
    input_leaf: str | None = None


def block_fp8(rows: int, columns: int, scale_dtype: torch.dtype) -> Kind:
    """As Qwen publishes it."""
    section = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [rows, columns],
    }
    return Kind(rows, columns, scale_dtype, "weight_scale_inv", section)


def compressed(rows: int, columns: int, weights: dict[str, Any], **more: Any) -> Kind:
    """As compressed-tensors writes it."""
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, **weights}
    section = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8}}},
        "sparsity_config": {},
        "transform_config": {},
    }
    return Kind(rows, columns, torch.bfloat16, "weight_scale", section, **more)


KINDS = {
    "blocks": block_fp8(32, 32, torch.float32),
    "blocks larger than most weights, bf16 scales": block_fp8(128, 128, torch.bfloat16),
    "blocks that divide nothing, f16 scales": block_fp8(40, 28, torch.float16),
    "one row": block_fp8(1, 16, torch.float32),
    "one scale a tensor": Kind(WHOLE, WHOLE, torch.float32, "weight_scale_inv", {"quant_method": "fp8"}, 0),
    "static": Kind(
        WHOLE,
        WHOLE,
        torch.float32,
        "weight_scale",
        {"quant_method": "fp8", "activation_scheme": "static"},
        1,
        "input_scale",
    ),
    "compressed-tensors channel": compressed(1, WHOLE, {"strategy": "channel"}),
    "compressed-tensors block": compressed(32, 32, {"strategy": "block", "block_structure": [32, 32]}),
    "compressed-tensors tensor": compressed(WHOLE, WHOLE, {"strategy": "tensor"}, scale_dims=1),
}


def to_fp8(weight: Tensor, kind: Kind) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and the bf16 weight that they stand for, block by block."""
    out_features, in_features = weight.shape
    tops, lefts = range(0, out_features, kind.rows), range(0, in_features, kind.columns)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    dense = torch.empty(weight.shape, dtype=torch.bfloat16)
    scales = torch.empty(len(tops), len(lefts), dtype=kind.scale_dtype)
    for i, top in enumerate(tops):
        for j, left in enumerate(lefts):
            where = slice(top, top + kind.rows), slice(left, left + kind.columns)
            block = weight[where].float()
            scales[i, j] = block.abs().max() / 448.0
            codes[where] = (block / scales[i, j].float()).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
            dense[where] = (codes[where].float() * scales[i, j].float()).to(torch.bfloat16)
    return codes, scales.reshape([1] * kind.scale_dims if kind.scale_dims < 2 else scales.shape), dense


def write_fp8(model: Path, kind: Kind, folder: Path, dense_linears: str = "none") -> tuple[Path, Path]:
    """An FP8 checkpoint of a model's linears, scales and weights in different shards, and its dense twin.

    Linears whose name holds ``dense_linears`` stay dense in both.
    """
    tensors: dict[str, Tensor] = {}
    for path in sorted(model.glob("*.safetensors")):
        tensors |= load_file(path)
    dense, scales, skipped = dict(tensors), {}, []
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj") or dense_linears in module:
            skipped.append(module)
            continue
        tensors[name], scales[f"{module}.{kind.leaf}"], dense[name] = to_fp8(tensor, kind)
        if kind.input_leaf is not None:
            scales[f"{module}.{kind.input_leaf}"] = torch.ones(())
    config = json.loads((model / "config.json").read_text())
    section = {**kind.section, "ignore" if "format" in kind.section else "modules_to_not_convert": skipped}
    for name, shards, changes in (
        ("fp8", dict(zip(SHARDS, (tensors, scales), strict=True)), {"quantization_config": section}),
        ("dense", {SHARDS[0]: dense}, {}),
    ):
        shutil.copytree(model, folder / name, ignore=shutil.ignore_patterns("*.safetensors", INDEX_NAME))
        for shard, content in shards.items():
            save_file(content, folder / name / shard)
        weight_map = {tensor: shard for shard, content in shards.items() for tensor in content}
        (folder / name / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        (folder / name / "config.json").write_text(json.dumps(config | changes))
    return folder / "fp8", folder / "dense"


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors are of one dtype and shape and equal in every bit."""
    return (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) and torch.equal(
        ours.contiguous().view(-1).view(torch.uint8), theirs.contiguous().view(-1).view(torch.uint8)
    )
