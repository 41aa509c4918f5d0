"""A build in MLX's layout, qconv's or mlx-lm's, as the dense checkpoint that it stands for, and as codes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qconv.artifacts.layout import strip_quantization
from qconv.artifacts.reported import has_report, read_report
from qconv.artifacts.source import Source, require_tokenizer
from qconv.boundary.printable import name_of
from qconv.checkpoint.header import TensorEntry
from qconv.checkpoint.reader import Checkpoint, in_config, map_rows, read_json, row_ranges
from qconv.conversion import mlx
from qconv.conversion.mlx import Mode
from qconv.conversion.weights import CodedWeights
from qconv.core.architecture import Linear
from qconv.core.qtensor import Grid, QTensor
from qconv.errors import CheckpointError
from qconv.formats import Format
from qconv.models import architecture

_KEY = "quantization"


def is_mlx(path: Path) -> bool:
    """Whether a folder's config.json tells of quantization as MLX's does."""
    config = path / "config.json"
    return config.is_file() and isinstance(read_json(config).get(_KEY), dict)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of the checkpoint lies.

    Attributes:
        name: The module that holds its codes, or the tensor, where it is plain.
        expert: Which of those that are stacked, if it is one.
        mode: How codes are read; None of plain tensors.
    """

    name: str
    expert: int | None
    mode: Mode | None

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors of the file that it is made of."""
        if self.mode is None:
            return (self.name,)
        leaves = ("weight", "scales", "biases") if self.mode.name == "affine" else ("weight", "scales")
        return tuple(f"{self.name}.{leaf}" for leaf in leaves)


@dataclass(frozen=True, slots=True)
class MlxWeights(CodedWeights):
    """Those of a build in MLX's layout.

    Attributes:
        stored: Its tensors.
        places: By the checkpoint's names.
    """

    stored: Checkpoint
    places: Mapping[str, Place]

    @classmethod
    def of(cls, path: Path, dtype: torch.dtype | None) -> MlxWeights:
        """Of a build.

        Args:
            path: Its folder.
            dtype: What matrices become; None to keep every number: in float32 what has codes.

        Raises:
            CheckpointError: damaged, incomplete, or in a mode that is not read.
            UsageError: how mlx-lm stores the model is not known.
        """
        stored = Checkpoint.open(path)
        config = {key: value for key, value in strip_quantization(stored.config).items() if key != _KEY}
        with in_config(path):
            model = architecture(config)
        mlx.require_known(model)
        places = {name: _place(stored, name, shape) for name, shape in model.tensors()}
        used = {tensor for place in places.values() for tensor in place.tensors}
        others = sorted(stored.entries.keys() - used)
        if others:
            raise CheckpointError(
                f"{stored.entry(others[0]).file}: {len(others)} tensors are not part of the model, the first "
                f"{name_of(others[0])!r}.",
                hint="config.json belongs to another build; qconv drops nothing silently.",
            )
        entries = {}
        for name, shape in model.tensors():
            entry, coded = stored.entry(places[name].tensors[0]), places[name].mode is not None
            own = (dtype or torch.float32) if coded else entry.dtype
            nbytes = own.itemsize * math.prod(shape)
            entries[name] = TensorEntry(name, own, shape, entry.file, entry.offset, nbytes)
        linears = {
            linear.weight: linear
            for layer in model.layers
            for linear in layer.linears()
            if places[linear.weight].mode is not None
        }
        return cls(entries, path, config, linears, dtype or torch.float32, model, stored, places)

    @property
    def files(self) -> list[Path]:
        """The build's shards."""
        return self.stored.files

    @property
    def format(self) -> Format | None:
        """None: no format of qconv's own."""
        return None

    @property
    def layout(self) -> str:
        """MLX's."""
        return "mlx"

    @property
    def scale_dtype(self) -> torch.dtype:
        """That of its own scales, or of plain weights where those are no numbers of it."""
        place = next(place for place in self.places.values() if place.mode is not None)
        dtype = self.stored.entry(f"{place.name}.scales").dtype
        return torch.bfloat16 if dtype is torch.uint8 else dtype

    def grid_of(self, linear: Linear) -> Grid | str:
        """The grid of its codes, or why its bases are no zero points."""
        found = self._whole(linear.weight)
        return found if isinstance(found, str) else found.grid

    def qtensor(self, name: str) -> QTensor:
        """The codes and scales of a weight."""
        found = self._whole(name)
        if isinstance(found, str):
            raise CheckpointError(f"{name}: {found}.", hint="The file changed while it was read.")
        return found

    def report(self) -> dict[str, Any]:
        """What a report in the folder says."""
        found = read_report(self.path) if has_report(self.path) else {}
        return {key: value for key, value in found.items() if key != "recipe" or "method" in value}

    def fingerprint(self) -> str:
        """Of the stored tensors."""
        return self.stored.fingerprint()

    def crc32(self, name: str, value: int = 0) -> int:
        """Of the words and scales that a tensor is made of."""
        for tensor in self._pieces(name).values():
            value = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, value)
        return value

    def read(self, name: str) -> Tensor:
        """The dense tensor."""
        return self._dense(name, self._pieces(name))

    def blocks(self, name: str, multiple: int = 1) -> Iterator[Tensor]:
        """The dense tensor as consecutive blocks of rows."""
        entry, place = self.entry(name), self.places[name]
        if place.expert is not None or len(entry.shape) < 2:
            yield self.read(name)
            return
        for start, stop in row_ranges(entry, multiple):
            rows = {one: map_rows(self.stored.entry(one), start, stop) for one in place.tensors}
            yield self._dense(name, rows)

    def gather(self, name: str, rows: Tensor) -> Tensor:
        """Chosen rows of the dense tensor, [len(rows), columns]."""
        return self.read(name)[rows]

    def _pieces(self, name: str) -> dict[str, Tensor]:
        place = self.places[name]
        if place.expert is None:
            return {one: self.stored.read(one) for one in place.tensors}
        one = place.expert
        return {tensor: map_rows(self.stored.entry(tensor), one, one + 1).squeeze(0) for tensor in place.tensors}

    def _dense(self, name: str, found: Mapping[str, Tensor]) -> Tensor:
        mode, dtype = self.places[name].mode, self.entry(name).dtype
        if mode is None:
            (plain,) = found.values()
            return plain
        return mlx.dense(_by_leaf(found), mode).to(dtype)

    def _whole(self, name: str) -> QTensor | str:
        mode = self.places[name].mode
        assert mode is not None
        return mlx.whole(_by_leaf(self._pieces(name)), mode)


def _by_leaf(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.rpartition(".")[2]: tensor for name, tensor in found.items()}


def _place(stored: Checkpoint, name: str, shape: tuple[int, ...]) -> Place:
    """Where a tensor lies.

    Raises:
        CheckpointError: it is missing, of another shape, or its codes are in a mode that is not read.
    """
    module, _, leaf = name.rpartition(".")
    called, expert = mlx.stacked(module)
    coded = leaf == "weight" and f"{called}.scales" in stored.entries
    place = Place(called, expert, _mode(stored, called, shape)) if coded else Place(f"{called}.{leaf}", expert, None)
    outer = 0 if expert is None else 1
    for tensor in place.tensors:
        entry = stored.entry(tensor)
        inner = entry.shape[outer:]
        rows_fit = len(inner) == len(shape) and inner[:-1] == shape[:-1]
        plain_fits = place.mode is not None or inner[-1:] == shape[-1:]
        if not rows_fit or not plain_fits or (expert is not None and not expert < entry.shape[0]):
            raise CheckpointError(
                f"{entry.file}: tensor {name_of(tensor)!r} is {list(entry.shape)}, config.json implies {list(shape)}.",
                hint="config.json belongs to another build, or the shard is damaged.",
            )
    return place


def _mode(stored: Checkpoint, called: str, shape: tuple[int, ...]) -> Mode:
    """By the shapes and dtypes of its tensors, as mlx-lm tells.

    Raises:
        CheckpointError: none that is read.
    """
    words, scales = stored.entry(f"{called}.weight"), stored.entry(f"{called}.scales")
    columns = shape[-1]
    bits, size = words.shape[-1] * 32 // columns, columns // max(1, scales.shape[-1])
    names = {(4, 32): "mxfp4", (4, 16): "nvfp4", (8, 32): "mxfp8"}
    name = "affine" if scales.dtype is not torch.uint8 else names.get((bits, size))
    affine = name == "affine" and f"{called}.biases" in stored.entries and bits in (2, 3, 4, 5, 6, 8)
    known = affine or (name not in (None, "affine") and f"{called}.global_scale" not in stored.entries)
    if not known or size * scales.shape[-1] != columns or words.dtype is not torch.uint32:
        raise CheckpointError(
            f"{words.file}: {name_of(called)}: {bits} bits, {size} to a scale of {scales.dtype}: no mode that is read.",
            hint="Quantize the original model again.",
        )
    assert name is not None
    return Mode(name, bits, size)


def mlx_source(path: Path, dtype: torch.dtype | None) -> Source:
    """A build in MLX's layout as what another one is made from.

    Raises:
        CheckpointError: as :meth:`MlxWeights.of`; or it lacks a tokenizer.
    """
    require_tokenizer(path)
    weights = MlxWeights.of(path, dtype)
    return Source(weights, weights.architecture, False)
