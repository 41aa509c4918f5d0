"""Round a checkpoint with compressed-tensors, several times. Arguments: MODEL CASES OUT.

CASES is a JSON object of names and objects: ``scheme``, of compressed-tensors' own presets, ``weights``, what is
different about its weights, ``ignore``, the list of exceptions, ``others``, further presets with what they target.
OUT/NAME becomes the build, OUT/NAME.dense a safetensors file of what compressed-tensors decompresses every quantized
weight to, float32 [out_features, in_features], from float32 copies of the scales.

No model of transformers is made, which would fuse the experts: every projection of the checkpoint becomes a Linear.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationStatus,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.interop.clients.compressed_tensors_fp4 import FORMATS, in_float32


def main(source: str, cases: str, out: str) -> None:
    for name, case in json.loads(cases).items():
        write(Path(source), Path(out) / name, **case)


def write(
    source: Path,
    out: Path,
    scheme: str,
    weights: dict[str, Any],
    ignore: list[str],
    others: dict[str, list[str]] | None = None,
) -> None:
    tensors: dict[str, Tensor] = {}
    for shard in source.glob("*.safetensors"):
        tensors |= load_file(shard)
    tree = linears(tensors)
    preset = preset_name_to_scheme(scheme, ["Linear"])
    preset.weights = preset.weights.model_copy(update=weights)
    groups = {"group_0": preset}
    for number, (name, targets) in enumerate((others or {}).items(), 1):
        groups[f"group_{number}"] = preset_name_to_scheme(name, targets)
    apply_quantization_config(tree, QuantizationConfig(config_groups=groups, ignore=ignore))
    for module in tree.modules():
        if hasattr(module, "quantization_scheme"):
            calibrate(module)
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(tree)
    compressor.compress_model(tree)
    written = {name: tensor.contiguous() for name, tensor in tree.state_dict().items()}
    rest = {name: tensor for name, tensor in tensors.items() if f"{name.removesuffix('.weight')}." not in modules(tree)}
    out.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors" and not file.name.endswith("index.json"):
            shutil.copyfile(file, out / file.name)
    save_file(rest | written, out / "model.safetensors")
    compressor.update_config(str(out))
    save_file(dict(decompressed(tree)), out.with_name(f"{out.name}.dense"))


def modules(tree: nn.Module) -> set[str]:
    return {f"{name}." for name, module in tree.named_modules() if isinstance(module, nn.Linear)}


def linears(tensors: dict[str, Tensor]) -> nn.Module:
    """A tree of modules with a Linear for every projection, by the names of the checkpoint."""
    root = nn.Module()
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or not path.endswith(("_proj", "lm_head")):
            continue
        *parents, last = path.split(".")
        parent = root
        for part in parents:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        linear = nn.Linear(tensor.shape[1], tensor.shape[0], bias=f"{path}.bias" in tensors, dtype=tensor.dtype)
        linear.weight.data = tensor
        if linear.bias is not None:
            linear.bias.data = tensors[f"{path}.bias"]
        parent.add_module(last, linear)
    return root


def calibrate(module: Any) -> None:
    """Scales and zero points from the weights' extremes."""
    args, weight = module.quantization_scheme.weights, module.weight
    shared = {}
    if args.strategy == "tensor_group":
        shared["global_scale"] = generate_gparam(weight.amin(), weight.amax())
        module.weight_global_scale.data = shared["global_scale"].view_as(module.weight_global_scale)
    if args.strategy in ("group", "tensor_group"):
        grouped = weight.unflatten(1, (-1, args.group_size))
        low, high = grouped.amin(-1), grouped.amax(-1)
    elif args.strategy == "channel":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    elif args.strategy == "block":
        rows, columns = args.block_structure
        blocks = weight.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    else:
        low, high = weight.amin(), weight.amax()
    module.weight_scale.data, module.weight_zero_point.data = calculate_qparams(low, high, args, **shared)
    if hasattr(module, "input_scale"):
        module.input_scale.data.fill_(0.02)
    if hasattr(module, "input_global_scale"):
        module.input_global_scale.data.fill_(96.0)


def decompressed(tree: nn.Module) -> Any:
    for name, module in tree.named_modules():
        if not hasattr(module, "quantization_scheme"):
            continue
        scheme: Any = module.quantization_scheme
        if scheme.format in FORMATS.values():  # whose own decompression rounds to bfloat16
            yield f"{name}.weight", in_float32(dict(module.named_parameters()), scheme).detach().contiguous()
            continue
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        stored = dict(module.named_parameters()) | {"weight_scale": module.weight_scale.float()}
        yield f"{name}.weight", compressor.decompress(stored, scheme)["weight"].contiguous()


if __name__ == "__main__":
    main(*sys.argv[1:])
