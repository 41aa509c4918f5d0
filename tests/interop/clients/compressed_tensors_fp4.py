"""Round a linear and its inputs by compressed-tensors' presets of short floats. Arguments: CASES OUT.

CASES are names of presets, with commas between. OUT/NAME.safetensors holds the tensors of the linear ``m``; its
metadata ``section`` the quantization_config. OUT/NAME.answer.safetensors holds the weight [out_features, in_features]
as compressed-tensors decompresses it, ``weight``, and in float32 from float32 copies, ``weight.float32``; where the
preset rounds inputs, ``inputs`` float32 [tokens, in_features] and what becomes of them, ``rounded``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.mx_utils import decompress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, forward_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.quantization.utils.helpers import generate_gparam
from safetensors.torch import save_file
from torch import Tensor, nn

FORMATS = {"NVFP4": "nvfp4-pack-quantized", "MXFP4": "mxfp4-pack-quantized", "MXFP8": "mxfp8-quantized"}


def main(cases: str, out: str) -> None:
    for name in cases.split(","):
        write(name, Path(out))


def write(name: str, out: Path) -> None:
    scheme = preset_name_to_scheme(name, ["Linear"])
    scheme.format = FORMATS[name.removesuffix("A16")]
    arguments, generator = scheme.weights, torch.Generator().manual_seed(0)
    weight = torch.randn(96, 128, generator=generator) ** 3 * 0.037
    groups = weight.view(96, -1, arguments.group_size)
    low, high = groups.amin(2), groups.amax(2)
    state: dict[str, Tensor] = {"weight": weight}
    shared = None
    if arguments.strategy == "tensor_group":
        shared = state["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
    state["weight_scale"], _ = calculate_qparams(low, high, arguments, shared)
    module, answer = nn.Linear(128, 96, bias=False), dict[str, Tensor]()
    if scheme.input_activations is not None:
        inputs = torch.randn(31, 128, generator=generator) ** 3
        inputs[0], inputs[1, :64] = 0.0, 1e-6
        module.quantization_status = QuantizationStatus.FROZEN
        if shared is not None:
            given = state["input_global_scale"] = generate_gparam(inputs.min(), inputs.max())
            module.register_buffer("input_global_scale", given)
        answer = {"inputs": inputs, "rounded": forward_quantize(module, inputs, "input", scheme.input_activations)}
    compressor: Any = BaseCompressor.get_value_from_registry(scheme.format)
    stored = compressor.compress(state, scheme)
    answer["weight"] = compressor.decompress(dict(stored), scheme)["weight"]
    answer["weight.float32"] = in_float32(stored, scheme)
    section = QuantizationConfig(config_groups={"group_0": scheme}, format=scheme.format).model_dump(mode="json")
    section["quant_method"] = "compressed-tensors"
    tensors = {f"m.{leaf}": tensor.detach().contiguous() for leaf, tensor in stored.items()}
    save_file(tensors, out / f"{name}.safetensors", {"section": json.dumps(section)})
    save_file({key: value.detach().contiguous() for key, value in answer.items()}, out / f"{name}.answer.safetensors")


def in_float32(stored: dict[str, Tensor], scheme: Any) -> Tensor:
    scales = stored["weight_scale"]
    scales = decompress_mx_scale(scales).float() if scales.dtype == torch.uint8 else scales.float()
    if "weight_packed" in stored:
        packed = stored["weight_packed"]
        codes = unpack_fp4_from_uint8(packed, len(packed), 2 * packed.shape[1], dtype=torch.float32)
    else:
        codes = stored["weight"].float()
    shared = stored.get("weight_global_scale")
    found: Tensor = dequantize(codes, scales, None, scheme.weights, dtype=torch.float32, global_scale=shared)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
