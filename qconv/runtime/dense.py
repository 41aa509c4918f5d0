"""The dense model that a build stands for, as an ordinary checkpoint that any loader reads."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from qconv.artifacts.source import companions
from qconv.boundary.content import is_gguf
from qconv.checkpoint.header import DTYPE_NAMES, TensorSpec
from qconv.checkpoint.reader import INDEX_NAME
from qconv.checkpoint.writer import ShardWriter, output_errors, write_atomically
from qconv.core.architecture import Linear, Module
from qconv.errors import OutputError
from qconv.runtime.files import open_files, require_no_bias
from qconv.runtime.tokenizer import load_tokenizer


def write_dense(path: Path, out: Path, dtype: torch.dtype) -> None:
    """Dequantize a build, one tensor at a time, into a new folder.

    Args:
        path: The build: a folder or a GGUF file.
        out: The folder to make; it must not exist or be empty.
        dtype: The dtype of every tensor written.

    Raises:
        CheckpointError: the build is damaged.
        OutputError: the folder cannot be written.
    """
    files = open_files(path)
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise OutputError(f"{out}: is not empty.", hint="Choose another folder.")
    model = files.architecture
    groups: list[list[Module]] = [[model.embedding]]
    groups += [[*layer.modules()] for layer in model.layers]
    groups.append([model.final_norm, *([model.lm_head] if model.lm_head is not None else [])])

    weight_map: dict[str, str] = {}
    for number, modules in enumerate(groups, start=1):
        shard = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        specs = [TensorSpec(name, dtype, shape) for module in modules for name, shape in module.tensors()]
        weight_map |= dict.fromkeys((spec.name for spec in specs), shard)
        with ShardWriter(out / shard, specs) as writer:
            for module in modules:
                if isinstance(module, Linear):
                    require_no_bias(files, module)
                for name, shape in module.tensors():
                    if isinstance(module, Linear) and name == module.weight:
                        writer.write(name, files.weight(module).dequantize(dtype).contiguous())
                    else:
                        writer.write(name, files.tensor(name, shape).to(dtype))
            writer.finish()
            writer.publish()

    config = dict(files.config)
    config.pop("torch_dtype", None)
    config["dtype"] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[DTYPE_NAMES[dtype]]
    write_atomically(out / "config.json", json.dumps(config, indent=2).encode() + b"\n")
    index = {"metadata": {}, "weight_map": weight_map}
    write_atomically(out / INDEX_NAME, json.dumps(index, indent=2).encode() + b"\n")
    if is_gguf(path):
        load_tokenizer(path).save_pretrained(out)
    for file in companions(path) if path.is_dir() else ():
        copied = out / file.relative_to(path)
        copied.parent.mkdir(exist_ok=True)
        write_atomically(copied, file.read_bytes())
