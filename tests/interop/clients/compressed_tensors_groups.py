"""Decompress a build by compressed-tensors' own assignment of its config groups. Arguments: BUILD ANSWER.

A module is made for every projection of the checkpoint, routers too; ``apply_quantization_config`` gives each the
scheme that its targets choose. The answer holds, for each that has one, the weight [out_features, in_features] as the
scheme's compressor computes it: from float32 copies of the scales, but for those of 8 bits as they are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

LEAVES = ("weight", "weight_packed")


def main(build: str, answer: str) -> None:
    section = json.loads((Path(build) / "config.json").read_text())["quantization_config"]
    tensors: dict[str, Tensor] = {}
    for shard in Path(build).glob("*.safetensors"):
        tensors |= load_file(shard)
    root = nn.Module()
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf in LEAVES and tensor.dim() == 2 and not path.endswith("embed_tokens"):
            add(root, path, shape_of(path, tensors))
    with torch.device("meta"):
        apply_quantization_config(root, QuantizationConfig.model_validate(section))
    found: dict[str, Tensor] = {}
    for name, module in root.named_modules():
        scheme: Any = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        stored = {part: tensors[f"{name}.{part}"] for part in parts(name, tensors)}
        if stored["weight_scale"].element_size() > 1:
            stored["weight_scale"] = stored["weight_scale"].float()
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        found[name] = compressor.decompress(stored, scheme)["weight"].contiguous()
    save_file(found, answer)


def parts(module: str, tensors: dict[str, Tensor]) -> list[str]:
    """The last parts of the names of a module's tensors."""
    leaves = ("weight", "weight_packed", "weight_scale", "weight_global_scale", "weight_zero_point", "weight_shape")
    return [leaf for leaf in leaves if f"{module}.{leaf}" in tensors]


def shape_of(module: str, tensors: dict[str, Tensor]) -> tuple[int, int]:
    """(out_features, in_features)."""
    shape, packed = tensors.get(f"{module}.weight_shape"), tensors.get(f"{module}.weight_packed")
    if shape is None and packed is not None:  # pairs
        return packed.shape[0], 2 * packed.shape[1]
    rows, columns = tensors[f"{module}.weight"].shape if shape is None else shape.tolist()
    return rows, columns


def add(root: nn.Module, path: str, shape: tuple[int, int]) -> None:
    """A Linear without memory at a path of a tree of modules."""
    *parents, last = path.split(".")
    parent = root
    for part in parents:
        if not hasattr(parent, part):
            parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    parent.add_module(last, nn.Linear(shape[1], shape[0], bias=False, device="meta"))


if __name__ == "__main__":
    main(*sys.argv[1:])
