"""A build opened for reading: a quantized checkpoint with its format, grid and folded scales."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qconv.checkpoint.header import TensorEntry, read_header
from qconv.checkpoint.reader import Checkpoint, map_tensor
from qconv.errors import CheckpointError
from qconv.folding import SCALE_SUFFIX
from qconv.formats import Format, detect
from qconv.models import Architecture, architecture
from qconv.models.base import Layer, Linear
from qconv.qtensor import Grid, QTensor
from qconv.source import untied

REPORT_NAME = "qconv-report.json"
SCALES_FOLDER = "qconv-scales"
"""Beside the shards, where engines do not look: what was folded into each layer, for verification."""


@dataclass(frozen=True, slots=True)
class Build:
    """A quantized checkpoint.

    Attributes:
        checkpoint: Its tensors.
        architecture: The model that it is a build of.
        format: Its format.
        grid: The grid of its quantized linears.
        skipped: The skip list of its config.json.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    format: Format
    grid: Grid
    skipped: tuple[str, ...]

    @classmethod
    def open(cls, path: Path) -> Build:
        """Open a build.

        Raises:
            CheckpointError: damaged, of unknown architecture, or not of a format that qconv reads.
        """
        return cls.of(Checkpoint.open(path))

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Build:
        """The build that a checkpoint is.

        Raises:
            CheckpointError: as :meth:`open`.
        """
        checkpoint = untied(checkpoint)
        path, found = checkpoint.path, detect(checkpoint.config)
        if found is None:
            raise CheckpointError(
                f"{path}: config.json has no quantization_config that qconv reads.",
                hint="Is this an unquantized checkpoint?",
            )
        with in_config(path):
            model = architecture(checkpoint.config)
            embedding = checkpoint.entry(model.embedding.weight).dtype
            grid, skipped = found.read_config(checkpoint.config["quantization_config"], embedding)
        build = cls(checkpoint, model, found, grid, tuple(skipped))
        for linear in (linear for layer in model.layers for linear in layer.linears()):
            problem = found.check(linear.out_features, linear.in_features, grid)
            if problem is not None and build.is_quantized(linear):
                raise CheckpointError(
                    f"{path / 'config.json'}: {linear.name} cannot be quantized as it says: {problem}.",
                    hint="config.json belongs to another build, or is damaged.",
                )
        return build

    @property
    def path(self) -> Path:
        """The folder."""
        return self.checkpoint.path

    def is_quantized(self, linear: Linear) -> bool:
        """Whether the file holds no plain weight for a linear: none at all, or one of E4M3 floats."""
        entry = self.checkpoint.entries.get(linear.weight)
        return entry is None or entry.dtype == torch.float8_e4m3fn

    def qtensor(self, linear: Linear) -> QTensor:
        """A quantized linear's weight.

        Raises:
            CheckpointError: tensors absent or misshapen.
        """
        shape = (linear.out_features, linear.in_features)
        return self.format.unpack(linear.name, shape, self.checkpoint.read, self.grid)

    def method(self) -> tuple[str, ...] | None:
        """By which steps the build was made, if its report tells."""
        try:
            steps = json.loads((self.path / REPORT_NAME).read_text())["recipe"]["method"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return (steps,) if isinstance(steps, str) else tuple(steps)

    def expected_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the tensors that the build must hold, given which plain weights it lacks."""
        linears = {linear.weight: linear for layer in self.architecture.layers for linear in layer.linears()}
        for name, shape in self.architecture.tensors():
            linear = linears.get(name)
            if linear is None or not self.is_quantized(linear):
                yield name, shape
                continue
            for spec in self.format.specs(linear.name, linear.out_features, linear.in_features, self.grid):
                yield spec.name, spec.shape

    def fold_scales(self, layer: Layer) -> dict[str, Tensor]:
        """What was folded into a layer, float32 by producer; empty if nothing was.

        Raises:
            CheckpointError: the scales file is damaged.
        """
        return read_scales(scales_path(self.path, layer.index))


@contextmanager
def in_config(folder: Path) -> Iterator[None]:
    """Errors about a config.json say in which folder it lies, which those who read it do not know.

    Raises:
        CheckpointError: what the body raises.
    """
    try:
        yield
    except CheckpointError as error:
        if not error.message.startswith("config.json"):
            raise
        raise CheckpointError(f"{folder / error.message}", hint=error.hint) from error


def scales_path(folder: Path, layer: int) -> Path:
    """Where a layer's folded scales lie."""
    return folder / SCALES_FOLDER / f"layer-{layer:05d}.safetensors"


def read_scales(path: Path) -> dict[str, Tensor]:
    """Folded scales from a file; empty if there is none.

    Raises:
        CheckpointError: the file is damaged or holds values that are no scales.
    """
    if not path.exists():
        return {}
    folds = {}
    for name, entry in read_header(path).items():
        folds[name.removesuffix(SCALE_SUFFIX)] = _scale(entry)
    return folds


def _scale(entry: TensorEntry) -> Tensor:
    scale = map_tensor(entry)
    if entry.dtype != torch.float32 or not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise CheckpointError(f"{entry.file}: {entry.name!r} is not a positive float32 scale.")
    return scale


def strip_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json without its quantization section."""
    return {key: value for key, value in config.items() if key != "quantization_config"}
