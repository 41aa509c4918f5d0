"""Decompress every FP8 linear of a build with compressed-tensors' own functions. Arguments: BUILD ANSWER.

The answer holds, for each linear, ``bfloat16`` and ``float32``: the weight [out_features, in_features] as
compressed-tensors computes it from the stored bfloat16 scales and from the same scales as float32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from torch import Tensor


def main(build: str, answer: str) -> None:
    section = json.loads((Path(build) / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(section)
    (scheme,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    tensors: dict[str, Tensor] = {}
    for shard in Path(build).glob("*.safetensors"):
        tensors |= load_file(shard)

    unpacked: dict[str, Tensor] = {}
    for module in sorted(name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")):
        stored = {part: tensors[f"{module}.{part}"] for part in ("weight", "weight_scale")}
        for dtype in (stored["weight_scale"].dtype, torch.float32):
            given = stored | {"weight_scale": stored["weight_scale"].to(dtype)}
            unpacked[f"{module}.{str(dtype).removeprefix('torch.')}"] = compressor.decompress(given, scheme)["weight"]
    save_file({name: tensor.contiguous() for name, tensor in unpacked.items()}, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
