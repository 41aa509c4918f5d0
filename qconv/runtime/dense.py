"""The dense model that a build stands for, as an ordinary checkpoint that any loader reads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from qconv.artifacts.separation import dense_tensors
from qconv.artifacts.source import companions
from qconv.boundary.content import is_gguf
from qconv.checkpoint.header import DTYPE_NAMES, TensorSpec
from qconv.checkpoint.reader import INDEX_NAME
from qconv.checkpoint.writer import ShardWriter, output_errors, write_atomically
from qconv.core.architecture import Linear
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
    modules = [model.embedding, *(one for layer in model.layers for one in layer.modules()), model.final_norm]
    modules += [model.lm_head] if model.lm_head is not None else []
    shapes = {name: shape for module in modules for name, shape in module.tensors()}
    linears = {module.weight: module for module in modules if isinstance(module, Linear)}

    def read(name: str) -> Tensor:
        if name not in linears:
            return files.tensor(name, shapes[name]).to(dtype)
        require_no_bias(files, linears[name])
        return files.weight(linears[name]).dequantize(dtype).contiguous()

    weight_map: dict[str, str] = {}
    groups = list(dense_tensors(model))
    for number, tensors in enumerate(groups, start=1):
        shard = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        specs = [TensorSpec(tensor.name, dtype, tensor.shape) for tensor in tensors]
        weight_map |= dict.fromkeys((spec.name for spec in specs), shard)
        with ShardWriter(out / shard, specs) as writer:
            for tensor in tensors:
                writer.write_blocks(tensor.name, tensor.blocks(read))
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
