"""A GGUF model as the dense checkpoint that it stands for, and as codes where a type has one scale a group."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from qconv.artifacts.layout import strip_quantization
from qconv.artifacts.reported import has_report, read_report
from qconv.artifacts.source import Source, require_tokenizer
from qconv.checkpoint.header import TensorEntry
from qconv.checkpoint.reader import Checkpoint, in_config, map_tensor, read_json, row_ranges
from qconv.conversion.exact import stored_as
from qconv.conversion.weights import CodedWeights
from qconv.core.architecture import Linear
from qconv.core.qtensor import Grid, QTensor
from qconv.errors import CheckpointError, UsageError
from qconv.formats import Format
from qconv.formats.gguf.config import config_of
from qconv.formats.gguf.names import architecture_name
from qconv.formats.gguf.reader import GgufModel, set_name
from qconv.formats.gguf.sampling import generation_of
from qconv.grids.ggml.whole import GRIDS, SIGNED, from_blocks, has_negative_scales
from qconv.models import architecture
from qconv.runtime.gguf_files import GgufFiles
from qconv.runtime.gguf_tokenizer import gguf_tokenizer

_DENSE = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_PLAIN = torch.bfloat16
"""What models are published in, and what the small tensors were that a file holds as F32."""
_SAME = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts_per_tok",
    "rms_norm_eps",
    "norm_topk_prob",
    "sliding_window",
)
"""Keys of config.json in which two that are of one model do not differ."""


@dataclass(frozen=True, slots=True)
class GgufWeights(CodedWeights):
    """Those of a GGUF model.

    Attributes:
        model: Its files.
        signed: Whether scales of Q4_0 are negative somewhere.
    """

    model: GgufFiles
    signed: bool

    @classmethod
    def of(cls, model: GgufFiles, folder: Path, config: dict[str, Any], dtype: torch.dtype | None) -> GgufWeights:
        """Of an open model.

        Args:
            model: Its files.
            folder: Where config.json and the tokenizer lie.
            config: That config.json.
            dtype: What matrices become; None to keep every number: in float32 what has codes.
        """
        linears = {
            linear.weight: linear
            for layer in model.architecture.layers
            for linear in layer.linears()
            if model.type_of(linear.weight) not in _DENSE
        }
        entries = {name: _entry(model, name, shape, dtype) for name, shape in model.architecture.tensors()}
        q4_0 = [one for name, one in linears.items() if model.type_of(name) is GGMLQuantizationType.Q4_0]
        coded = (model.coded(one.weight, (one.out_features, one.in_features)) for one in q4_0)
        signed = any(has_negative_scales(one[0], GGMLQuantizationType.Q4_0) for one in coded if one is not None)
        return cls(entries, folder, config, linears, dtype or torch.float32, model.architecture, model, signed)

    @property
    def files(self) -> list[Path]:
        """The model's."""
        return list(self.model.model.files)

    @property
    def format(self) -> Format | None:
        """None: blocks are no layout of safetensors."""
        return None

    @property
    def layout(self) -> str:
        """GGUF, with the type that most of the linears have."""
        types = [self.model.type_of(name).name for name in self.linears]
        return f"gguf:{max(sorted(set(types)), key=types.count)}" if types else "gguf"

    @property
    def scale_dtype(self) -> torch.dtype:
        """That of ggml's scales."""
        return torch.float16

    def grid_of(self, linear: Linear) -> Grid | str:
        """The grid of its type's codes, or why there is none."""
        type = self.model.type_of(linear.weight)
        grid = GRIDS.get(type)
        coded = self.model.coded(linear.weight, (linear.out_features, linear.in_features))
        if grid is None or coded is None:
            return f"blocks of {type.name} are no codes with one scale a group"
        if type is GGMLQuantizationType.Q4_0 and self.signed:
            return SIGNED
        if type is not GGMLQuantizationType.Q4_1:
            return grid
        found = from_blocks(coded[0], type)
        return found if isinstance(found, str) else grid

    def qtensor(self, name: str) -> QTensor:
        """The codes and scales of a linear's blocks, by its weight's name."""
        linear = self.linears[name]
        coded = self.model.coded(name, (linear.out_features, linear.in_features))
        assert coded is not None
        found = from_blocks(coded[0], coded[1], signed=self.signed, global_scale=self.model.scale_of(name))
        if isinstance(found, str):
            raise CheckpointError(
                f"{self.files[0]}: {name}: {found}.",
                hint="The file is damaged; --to bf16 takes its numbers as they are.",
            )
        return found

    def report(self) -> dict[str, Any]:
        """What the model's report says of where it comes from."""
        folder = self.files[0].parent
        return {"source": read_report(folder)["source"]} if has_report(folder) else {}

    def fingerprint(self) -> str:
        """That of the files, of which headers and samples are read."""
        stored = {f"{name} {number}": part for name in self.entries for number, part in enumerate(self._stored(name))}
        return Checkpoint(stored, self.path, self.config).fingerprint()

    def crc32(self, name: str, value: int = 0) -> int:
        """Of the blocks that a tensor is made of."""
        for part in self._stored(name):
            for start, stop in row_ranges(part):
                rows = replace(part, shape=(stop - start, *part.shape[1:]))
                size = part.nbytes // part.shape[0]
                block = replace(rows, offset=part.offset + start * size, nbytes=(stop - start) * size)
                value = zlib.crc32(map_tensor(block).view(-1).numpy().data, value)
        return value

    def read(self, name: str) -> Tensor:
        """The dense tensor."""
        entry = self.entry(name)
        return self.model.tensor(name, entry.shape).to(entry.dtype)

    def blocks(self, name: str, multiple: int = 1) -> Iterator[Tensor]:
        """The dense tensor as consecutive blocks of rows; one that the file holds otherwise is read whole."""
        entry = self.entry(name)
        if len(entry.shape) != 2 or not self.model.is_in_order(name):
            yield from torch.split(self.read(name), _rows(entry, multiple)) if entry.shape else [self.read(name)]
            return
        for start, stop in row_ranges(entry, multiple):
            yield self.model.values(name, (entry.shape[0], entry.shape[1]), start, stop).to(entry.dtype)

    def gather(self, name: str, rows: Tensor) -> Tensor:
        """Chosen rows of the dense tensor, [len(rows), columns]."""
        return self.read(name)[rows]

    def _stored(self, name: str) -> list[TensorEntry]:
        return self.model.stored(name, self.entry(name).shape)


def _rows(entry: TensorEntry, multiple: int) -> int:
    """Rows of a block."""
    start, stop = next(row_ranges(entry, multiple))
    return max(1, stop - start)


def _entry(model: GgufFiles, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> TensorEntry:
    """A tensor as it is read.

    Small ones that a file holds as F32 are in 16 bits what they were before, or stay.
    """
    stored = model.stored(name, shape)[0]
    type = model.type_of(name)
    own = _DENSE.get(type, torch.float32)
    small = type is GGMLQuantizationType.F32 and len(shape) < 2
    if small and stored_as(model.tensor(name, shape), dtype or _PLAIN) is not None:
        own = dtype or _PLAIN
    elif dtype is not None and not small:
        own = dtype
    return TensorEntry(name, own, shape, stored.file, stored.offset, own.itemsize * math.prod(shape))


@contextlib.contextmanager
def gguf_source(path: Path, like: Path | None, dtype: torch.dtype | None) -> Iterator[Source]:
    """A GGUF model as what a build is made from.

    Args:
        path: A file, any of a set, or a folder that holds one model.
        like: The folder of the model that it was made from, of which only config.json and what travels with a build is
            read; None to make those from the file's keys.
        dtype: What matrices become; None to keep every number.

    Raises:
        CheckpointError: damaged, of an architecture that qconv does not know, or with keys that do not suffice.
        UsageError: ``like`` is another model.
    """
    with contextlib.ExitStack() as stack:
        if like is None:
            model = GgufFiles.open(path)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / set_name(model.model.files[0])
            _write_companions(model, folder, dtype)
        else:
            folder = like
            require_tokenizer(folder)
            with in_config(folder):
                config = strip_quantization(read_json(folder / "config.json"))
                _require_like(GgufModel.open(path), config)
                model = GgufFiles.open(path, config=config)
        config = strip_quantization(read_json(folder / "config.json"))
        yield Source(GgufWeights.of(model, folder, config, dtype), model.architecture, False)


def _write_companions(model: GgufFiles, folder: Path, dtype: torch.dtype | None) -> None:
    """config.json, tokenizer, chat template and generation config from the file's keys.

    Raises:
        CheckpointError: the keys describe no tokenizer that qconv reads; names the key.
    """
    folder.mkdir()
    gguf_tokenizer(model.model).save_pretrained(folder)
    config = model.config | {"dtype": str(dtype or _PLAIN).removeprefix("torch.")}
    generation = generation_of(model.model.metadata)
    generation |= {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key)}
    for name, values in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _require_like(model: GgufModel, config: Mapping[str, Any]) -> None:
    """Check that a config.json says of the model what the file's keys say, where both say anything.

    Raises:
        UsageError: they differ; names the key.
    """
    try:
        own = config_of(model)
    except CheckpointError:
        return  # keys that qconv does not compute with: config.json knows better
    theirs = dict(config) | (config["text_config"] if isinstance(config.get("text_config"), dict) else {})
    said, called = architecture_name(architecture(dict(config)).family), model.metadata["general.architecture"]
    if said != called:
        raise UsageError(
            f"--like: is a {said} model to llama.cpp, {model.files[0]} a {called} one.", hint="Give its own."
        )
    for key in _SAME:
        if own.get(key) is not None and theirs.get(key) is not None and own[key] != theirs[key]:
            close = isinstance(own[key], float) and abs(own[key] - theirs[key]) <= 1e-6 * abs(theirs[key])
            if not close:
                raise UsageError(
                    f"--like: config.json: {key} is {theirs[key]}, {model.files[0]} says {own[key]}.",
                    hint="Give the model that the file was made from, or leave it out.",
                )
