"""A build in MLX's layout, qconv's or mlx-lm's own, read as a build with tensors for each expert.

mlx-lm quantizes embeddings, heads and routers too. Those are read as the plain weights that they stand for, in float32,
where no number is lost; linears of layers keep their codes. Every tensor is a view of the file.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qconv.artifacts.layout import strip_quantization
from qconv.boundary.printable import name_of
from qconv.checkpoint.config import quantization_of
from qconv.checkpoint.header import TensorEntry
from qconv.checkpoint.reader import Checkpoint, map_rows, map_tensor, row_ranges
from qconv.core.architecture import Architecture
from qconv.core.qtensor import Grid
from qconv.errors import CheckpointError, UsageError
from qconv.formats import mlx
from qconv.models import architecture

_LEAVES = ("weight", "scales", "biases")


@dataclass(frozen=True, slots=True)
class MlxCheckpoint(Checkpoint):
    """The view.

    Attributes:
        stored: The checkpoint as its files have it.
        ends: What is read as plain weights: where their words, scales and biases lie, by the weight's name.
        grids: On which grids they are.
    """

    stored: Checkpoint
    ends: Mapping[str, tuple[TensorEntry, ...]]
    grids: Mapping[str, Grid]

    @property
    def files(self) -> list[Path]:
        """The shards."""
        return self.stored.files

    def is_dequantized(self, name: str) -> bool:
        """Whether it has codes, and is no linear of a layer."""
        return name in self.ends

    def fingerprint(self) -> str:
        """That of the files."""
        return self.stored.fingerprint()

    def crc32(self, name: str, value: int = 0) -> int:
        """Of what a tensor is made of."""
        if name not in self.ends:
            return Checkpoint.crc32(self, name, value)
        for entry in self.ends[name]:
            value = zlib.crc32(map_tensor(entry).contiguous().view(-1).view(torch.uint8).numpy().data, value)
        return value

    def read(self, name: str) -> Tensor:
        """The dense tensor."""
        if name not in self.ends:
            return Checkpoint.read(self, name)
        return self._dense(name, [map_tensor(entry) for entry in self.ends[name]])

    def blocks(self, name: str, multiple: int = 1) -> Iterator[Tensor]:
        """The dense tensor as consecutive blocks of rows."""
        if name not in self.ends:
            yield from Checkpoint.blocks(self, name, multiple)
            return
        for start, stop in row_ranges(self.entry(name), multiple):
            yield self._dense(name, [map_rows(entry, start, stop) for entry in self.ends[name]])

    def gather(self, name: str, rows: Tensor) -> Tensor:
        """Chosen rows of the dense tensor, [len(rows), columns]."""
        if name not in self.ends:
            return Checkpoint.gather(self, name, rows)
        # torch picks no rows of words without a sign.
        picked = [_signed(map_tensor(entry)).index_select(0, rows) for entry in self.ends[name]]
        parts = [one.view(entry.dtype) for one, entry in zip(picked, self.ends[name], strict=True)]
        return self._dense(name, parts)

    def _dense(self, name: str, parts: list[Tensor]) -> Tensor:
        module, entry = name.removesuffix(".weight"), self.entry(name)
        found = dict(zip((f"{module}.{leaf}" for leaf in _LEAVES), parts, strict=False))
        shape = (len(parts[0]), entry.shape[1])
        return mlx.FORMAT.unpack(module, shape, found.__getitem__, self.grids[name]).dequantize(entry.dtype)


def _signed(words: Tensor) -> Tensor:
    return words.view(torch.int32) if words.dtype is torch.uint32 else words


def is_mlx(config: Mapping[str, Any]) -> bool:
    """Whether a config.json tells of quantization as MLX's does, and in no other words."""
    said = config.get(mlx.KEY)
    return isinstance(said, dict) and quantization_of(config) in (None, said)


def mlx_view(stored: Checkpoint) -> MlxCheckpoint:
    """The view of a checkpoint whose config.json is MLX's.

    How codes of a module lie is told by the shapes of its tensors, as mlx-lm does; config.json says it of the view.

    Raises:
        CheckpointError: a tensor of another shape than config.json implies, or of a mode that is not read.
        UsageError: how mlx-lm stores the model is not known.
    """
    config = strip_quantization(stored.config)
    model = architecture(config)
    if model.family not in mlx.FAMILIES:
        raise UsageError(
            f"{stored.path}: how mlx-lm stores a {model.family} model is not known to qconv.",
            hint=f"Known are {', '.join(mlx.FAMILIES)}.",
        )
    linears = {linear.weight for layer in model.layers for linear in layer.linears()}
    entries: dict[str, TensorEntry] = {}
    ends: dict[str, tuple[TensorEntry, ...]] = {}
    grids: dict[str, Grid] = {}
    used: Counter[str] = Counter()
    for name, shape in model.tensors():
        module, _, leaf = name.rpartition(".")
        path = mlx.called(module)
        if leaf != "weight" or f"{path}.scales" not in stored.entries:
            found = _entry(stored, f"{path}.{leaf}", name)
            if found is not None:
                entries[name] = found
                used[f"{path}.{leaf}"] += 1
            continue
        grids[name] = _grid(stored, path, shape, stacked=path != module)
        leaves = [one for one in _LEAVES if f"{path}.{one}" in stored.entries]
        parts = [_entry(stored, f"{path}.{one}", f"{module}.{one}") for one in leaves]
        used.update(f"{path}.{one}" for one in leaves)
        views = tuple(part for part in parts if part is not None)
        if name in linears:
            entries |= {view.name: view for view in views}
        elif views:
            nbytes = math.prod(shape) * torch.float32.itemsize
            entries[name] = replace(views[0], name=name, dtype=torch.float32, shape=shape, nbytes=nbytes, strides=())
            ends[name] = views
    _require_all(stored, used)
    others = {name: entry for name, entry in stored.entries.items() if name not in used}
    said = _section(model, grids)
    return MlxCheckpoint(
        {**entries, **others}, stored.path, {**stored.config, **mlx.FORMAT.keys(said)}, stored, ends, grids
    )


def mlx_names(model: Architecture, listed: Set[str]) -> set[str]:
    """The tensors that :func:`mlx_view` makes of those that an index lists; what it dequantizes is listed coded."""
    found, used = set[str](), set[str]()
    for name, _ in model.tensors():
        module, _, leaf = name.rpartition(".")
        path = mlx.called(module)
        for one in dict.fromkeys((leaf, *_LEAVES) if leaf == "weight" else (leaf,)):
            if f"{path}.{one}" in listed:
                found.add(f"{module}.{one}")
                used.add(f"{path}.{one}")
    return found | (listed - used)


def _entry(stored: Checkpoint, called: str, name: str) -> TensorEntry | None:
    """A tensor under the name that the family's checkpoints have; None where it is missing.

    Raises:
        CheckpointError: there are fewer experts than config.json implies.
    """
    entry, place = stored.entries.get(called), mlx.FORMAT.place(name)
    if entry is None or place is None:
        return None if entry is None else replace(entry, name=name)
    if not entry.shape or place.number >= entry.shape[0]:
        raise _misshapen(entry, f"an expert {place.number}")
    outer, *inner = entry.steps
    return entry.view(name, place.number * outer, entry.shape[1:], tuple(inner))


def _require_all(stored: Checkpoint, used: Mapping[str, int]) -> None:
    """Check that no tensor of experts has more of them than the model.

    Raises:
        CheckpointError: one has.
    """
    for called, count in used.items():
        entry = stored.entry(called)
        if ".switch_mlp." in called and entry.shape[0] != count:
            raise _misshapen(entry, f"{count} experts")


def _misshapen(entry: TensorEntry, implied: str) -> CheckpointError:
    return CheckpointError(
        f"{entry.file}: tensor {name_of(entry.name)!r} is {list(entry.shape)}, config.json implies {implied}.",
        hint="config.json belongs to another build, or the shard is damaged.",
    )


def _grid(stored: Checkpoint, path: str, shape: tuple[int, ...], stacked: bool) -> Grid:
    """The grid of a module's codes, by the shapes and dtypes of its tensors.

    Raises:
        CheckpointError: none that is read.
    """
    words, scales = stored.entry(f"{path}.weight"), stored.entry(f"{path}.scales")
    columns, outer = shape[-1], 1 if stacked else 0
    wide = words.dtype is torch.uint32 and len(words.shape) == len(scales.shape) == 2 + outer
    bits = words.shape[-1] * 32 // columns if wide else 0
    size = columns // max(1, scales.shape[-1]) if wide else 0
    said: dict[str, Any] = {"bits": bits, "group_size": size, "mode": "affine"}
    if scales.dtype is torch.uint8:
        said["mode"] = {(4, 32): "mxfp4", (4, 16): "nvfp4", (8, 32): "mxfp8"}.get((bits, size), "unknown")
    if f"{path}.global_scale" in stored.entries:
        said["mode"] = f"{said['mode']} with a global scale"
    whole = wide and bits * columns == 32 * words.shape[-1] and size * scales.shape[-1] == columns
    if not whole or words.shape[outer] != shape[0]:
        raise _misshapen(words, f"{list(shape)}")
    return mlx.grid_of(said, path, scales.dtype)


def _section(model: Architecture, grids: Mapping[str, Grid]) -> dict[str, Any]:
    """What config.json says of the grids of linears, by modules' names."""
    names: dict[Grid, list[str]] = {}
    for layer in model.layers:
        for linear in layer.linears():
            if linear.weight in grids:
                names.setdefault(grids[linear.weight], []).append(linear.name)
    if not names:
        raise CheckpointError(
            f"config.json: {mlx.KEY}: no linear of a layer has codes.", hint="config.json belongs to another build."
        )
    return mlx.FORMAT.config(names, ())
