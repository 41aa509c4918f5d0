"""Unpack every quantized linear of a build with compressed-tensors' own functions. Arguments: BUILD ANSWER.

The answer holds, for each linear, ``codes`` (int8, signed), ``bfloat16`` and ``float32``: the weight as
compressed-tensors computes it from the stored bfloat16 scales and from the same scales as float32. All are
[out_features, in_features]. Where there are zero points, it holds ``zero_points``, int8 [out_features, groups].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

PARTS = ("weight_packed", "weight_scale", "weight_shape")


def main(build: str, answer: str) -> None:
    section = json.loads((Path(build) / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(section)
    (scheme,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    tensors: dict[str, Tensor] = {}
    for shard in Path(build).glob("*.safetensors"):
        tensors |= load_file(shard)

    unpacked: dict[str, Tensor] = {}
    for module in sorted(name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")):
        stored = {part: tensors[f"{module}.{part}"] for part in PARTS}
        if not scheme.weights.symmetric:
            packed = stored["weight_zero_point"] = tensors[f"{module}.weight_zero_point"]
            shape = stored["weight_scale"].shape
            unpacked[f"{module}.zero_points"] = unpack_from_int32(packed, scheme.weights.num_bits, shape, packed_dim=0)
        exact = stored | {"weight_scale": stored["weight_scale"].float()}
        unpacked[f"{module}.codes"] = unpack_from_int32(
            stored["weight_packed"], scheme.weights.num_bits, stored["weight_shape"]
        )
        unpacked[f"{module}.bfloat16"] = compressor.decompress(stored, scheme)["weight"]
        unpacked[f"{module}.float32"] = compressor.decompress(exact, scheme)["weight"]
    save_file({name: tensor.contiguous() for name, tensor in unpacked.items()}, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
