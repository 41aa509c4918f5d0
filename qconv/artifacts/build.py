"""A build opened for reading: a quantized checkpoint with its format, grids and folded scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qconv.artifacts.dtypes import WEIGHT_DTYPES
from qconv.artifacts.layout import layout_of
from qconv.artifacts.opening import open_checkpoint, untied
from qconv.artifacts.reported import has_report, read_report, says_matched
from qconv.artifacts.verbatim import Verbatim, VerbatimPart, verbatim_of
from qconv.boundary.printable import name_of
from qconv.checkpoint.header import TensorEntry, TensorSpec, read_header
from qconv.checkpoint.maps import MapTensor
from qconv.checkpoint.reader import Checkpoint, in_config, map_tensor
from qconv.checkpoint.rope import in_both_spellings
from qconv.core.architecture import Architecture, Layer, Linear
from qconv.core.qtensor import Grid, QTensor
from qconv.errors import CheckpointError
from qconv.formats import Format
from qconv.formats.base import Described
from qconv.formats.float4 import reciprocal_of
from qconv.methods import rounding_of
from qconv.models import architecture
from qconv.models.folding import SCALE_SUFFIX, output_channels

_CODES = (torch.float8_e4m3fn, torch.int8, torch.uint8, torch.uint32)
_SCALES = (".scales", ".weight_scale", ".weight_scale_inv")
SCALES_FOLDER = "qconv-scales"
"""Beside the shards, where engines do not look: what was folded into each layer, for verification."""


@dataclass(frozen=True, slots=True)
class Build:
    """A quantized checkpoint.

    Attributes:
        checkpoint: Its tensors.
        architecture: The model that it is a build of.
        format: Its format.
        described: What its config.json says of grids and exceptions.
        grids: The grid of each linear by that, by name; those that no config group targets have none.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    format: Format
    described: Described
    grids: Mapping[str, Grid]

    @classmethod
    def open(cls, path: Path) -> Build:
        """Open a build.

        Raises:
            CheckpointError: damaged, of unknown architecture, or not of a format that qconv reads.
        """
        return cls.of(open_checkpoint(path))

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Build:
        """The build that a checkpoint is.

        Raises:
            CheckpointError: as :meth:`open`.
        """
        checkpoint = untied(checkpoint)
        path, layout = checkpoint.path, layout_of(checkpoint.path, checkpoint.config)
        if layout.format is None or layout.section is None:
            raise CheckpointError(
                f"{path}: config.json has no quantization_config of a format of qconv's.",
                hint="Is this an unquantized checkpoint?",
            )
        with in_config(path):
            model = architecture(checkpoint.config)
            embedding = checkpoint.entry(model.embedding.weight).dtype
            described = layout.format.read_config(layout.section, embedding)
        linears = [linear for layer in model.layers for linear in layer.linears()]
        routers = [router for layer in model.layers for router in layer.routers()]
        grids = described.grids([model.head_name, *(one.name for one in (*linears, *routers))])
        build = cls(checkpoint, model, layout.format, described, grids)
        for linear in linears:
            grid = grids.get(linear.name, described.grid)
            problem = layout.format.check(linear.out_features, linear.in_features, grid)
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
        """Whether the file holds no plain weight for a linear: none at all, or one of whole numbers or short floats."""
        entry = self.checkpoint.entries.get(linear.weight)
        return entry is None or entry.dtype in _CODES

    def qtensor(self, linear: Linear, mapped: MapTensor = map_tensor) -> QTensor:
        """A quantized linear's weight.

        Raises:
            CheckpointError: tensors absent or misshapen.
        """
        shape = (linear.out_features, linear.in_features)
        return self.format.unpack(linear.name, shape, partial(self.part, linear, mapped=mapped), self.grid_of(linear))

    @property
    def skipped(self) -> tuple[str, ...]:
        """The skip list of config.json."""
        return self.described.skipped

    def is_skipped(self, name: str) -> bool:
        """Whether readers leave a linear unquantized by what config.json says."""
        return name not in self.grids or self.format.is_skipped(name, self.skipped)

    def grid_of(self, linear: Linear) -> Grid:
        """The grid of a linear's weight: other tools store scales in a dtype of their own."""
        grid, entries = self.grids.get(linear.name, self.described.grid), self.checkpoint.entries
        for spec in self.format.specs(linear.name, linear.out_features, linear.in_features, grid):
            scales = entries.get(spec.name) if spec.name.endswith(_SCALES) else None
            if scales is not None and scales.dtype in WEIGHT_DTYPES:
                return replace(grid, scale_dtype=scales.dtype)
        return grid

    def part(self, linear: Linear, name: str, mapped: MapTensor = map_tensor) -> Tensor:
        """One of a weight's tensors. ``g_idx`` may be absent where inputs are grouped in their order.

        Raises:
            CheckpointError: it is absent.
        """
        entry = self.checkpoint.entries.get(name)
        if entry is not None:
            part = mapped(entry)
            # Two numbers, which others also store in four bytes each.
            return part.long() if name.endswith(".weight_shape") and part.dtype == torch.int32 else part
        if self._may_lack(linear, name):
            grid = self.grid_of(linear)
            return torch.arange(linear.in_features, dtype=torch.int32) // grid.width(linear.in_features)
        raise CheckpointError(
            f"{self.path}: tensor {name!r} is missing.",
            hint="The build is incomplete, or config.json belongs to another one.",
        )

    def input_scale(self, linear: Linear) -> float:
        """What a linear's inputs are divided by, on a grid that stores it.

        Raises:
            CheckpointError: it is absent, or not one number.
        """
        inverse = self.checkpoint.entries.get(f"{linear.name}.input_global_scale")
        if inverse is not None:
            return reciprocal_of(map_tensor(inverse), inverse.name)
        scale = self.part(linear, f"{linear.name}.input_scale")
        if scale.numel() != 1:
            raise CheckpointError(f"{linear.name}.input_scale: {list(scale.shape)}, not one number.")
        return float(scale)

    def _may_lack(self, linear: Linear, name: str) -> bool:
        return name.endswith(".g_idx") and not self.grid_of(linear).act_order

    @property
    def is_ours(self) -> bool:
        """Whether qconv made it, by the report that lies in it."""
        return has_report(self.path)

    def reported_verbatim(self) -> list[VerbatimPart]:
        """What a report says of the parts that the build holds beside the model; nothing where there is none.

        Raises:
            CheckpointError: the report is damaged.
        """
        said = read_report(self.path).get("verbatim", []) if self.is_ours else []
        return [VerbatimPart(**{field.name: one[field.name] for field in fields(VerbatimPart)}) for one in said]

    def method(self) -> tuple[str, ...] | None:
        """By which steps the build was made, if a report tells; of one that was converted, how that before was.

        Raises:
            CheckpointError: the report is damaged.
        """
        if not self.is_ours:
            return None
        report = read_report(self.path)
        converted = report.get("converted")
        if isinstance(converted, dict) and not converted.get("method_known", True):
            return None
        steps = report["recipe"]["method"]
        return (steps,) if isinstance(steps, str) else tuple(steps)

    def compensated(self) -> Callable[[str], bool]:
        """Whether linears, by name, may carry compensation for errors: those that a report lists, or all where none is.

        Raises:
            CheckpointError: the report is damaged.
        """
        method = self.method()
        if method is None:
            return lambda name: True
        report = read_report(self.path)
        if not report["recipe"].get("rules"):
            return lambda name: rounding_of(method) is not None
        listed = frozenset(name for layer in report["layers"] for name in layer["compensations"])
        return lambda name: name in listed

    @property
    def is_matched(self) -> bool:
        """Whether a report says that matched calibration moved weights before they were rounded.

        Raises:
            CheckpointError: the report is damaged.
        """
        return self.is_ours and says_matched(read_report(self.path))

    def expected_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the tensors that the build must hold, given which plain weights it lacks."""
        linears = {linear.weight: linear for layer in self.architecture.layers for linear in layer.linears()}
        if self.architecture.lm_head is not None:
            linears[self.architecture.lm_head.weight] = self.architecture.lm_head
        for name, shape in self.architecture.tensors():
            linear = linears.get(name)
            if linear is None or not self.is_quantized(linear):
                yield name, shape
                continue
            yield from ((spec.name, spec.shape) for spec in self.expected_parts(linear))
        for spec in self.cache_scales():
            yield spec.name, spec.shape

    def expected_parts(self, linear: Linear) -> Iterator[TensorSpec]:
        """The tensors that a quantized linear's weight must have."""
        for spec in self.format.specs(linear.name, linear.out_features, linear.in_features, self.grid_of(linear)):
            if spec.name in self.checkpoint.entries or not self._may_lack(linear, spec.name):
                yield spec

    def cache_scales(self) -> list[TensorSpec]:
        """The scales of a cache that a build of ours holds, in file order; others' are not needed to compute."""
        naming = self.format.cache
        if naming is None or not self.described.cache or not self.is_ours:
            return []
        dtype = self.checkpoint.entry(self.architecture.embedding.weight).dtype
        return [spec for layer in self.architecture.layers for spec in naming.specs(layer.attention.name, dtype)]

    def verbatim(self) -> tuple[Verbatim, ...]:
        """What it holds beside the model, as transformers' own model of the type declares it.

        Raises:
            CheckpointError: elements of such a tensor share bytes.
        """
        expected = {name for name, _ in self.expected_tensors()}
        others = [name for name in self.checkpoint.entries if name not in expected]
        return verbatim_of(self.checkpoint, self.architecture, others)

    def fold_scales(self, layer: Layer) -> dict[str, Tensor]:
        """What was folded into a layer, float32 by producer; empty if nothing was.

        Raises:
            CheckpointError: the scales file is damaged, or is of another layer.
        """
        path = scales_path(self.path, layer.index)
        scales, channels = read_scales(path), output_channels(layer)
        for name, scale in scales.items():
            if tuple(scale.shape) != (channels.get(name),):
                raise CheckpointError(
                    f"{path}: {name_of(name)!r} is {list(scale.shape)}; a scale is of the output channels of a norm or "
                    f"linear of layer {layer.index}.",
                    hint="The file is damaged, or of another build.",
                )
        return scales


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
    if scale.dtype != torch.float32 or not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise CheckpointError(f"{entry.file}: {entry.name!r} is not a positive float32 scale.")
    return scale


def with_both_spellings(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json that readers before and after transformers 5 understand.

    transformers 5 renamed ``num_experts`` to ``num_local_experts`` (except for Mixtral, which always said so) and moved
    what rotary embeddings need (:mod:`qconv.checkpoint.rope`); AutoAWQ and other archived readers know the old names
    alone.

    Raises:
        CheckpointError, UsageError: rope parameters that are malformed or contradict each other.
    """
    both = dict(config)
    if "num_local_experts" in both and both.get("model_type") != "mixtral":
        both.setdefault("num_experts", both["num_local_experts"])
    return both | in_both_spellings(both)
