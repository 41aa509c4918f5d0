"""Quantized weights as the dense checkpoint that they stand for: code times scale in float32, cast once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from qconv.artifacts.build import SCALES_FOLDER, Build
from qconv.artifacts.layout import strip_quantization
from qconv.artifacts.reported import has_report, read_report
from qconv.artifacts.source import Source, require_tokenizer
from qconv.checkpoint.header import TensorEntry
from qconv.checkpoint.reader import Checkpoint, row_ranges
from qconv.conversion.exact import same_numbers, stored_as
from qconv.core.architecture import Architecture, Linear
from qconv.core.qtensor import Grid, QTensor
from qconv.errors import CheckpointError
from qconv.formats import Format
from qconv.formats.mlx import with_zero_points


@dataclass(frozen=True, slots=True)
class CodedWeights(Checkpoint):
    """The dense view: same names, no scales, no ``quantization_config``.

    Attributes:
        linears: The quantized linears by their weights' names.
        dtype: What weights are cast to.
        architecture: The model.
    """

    linears: Mapping[str, Linear]
    dtype: torch.dtype
    architecture: Architecture

    @property
    def format(self) -> Format | None:
        """The layout that they are in; None of one that is no layout of safetensors."""
        raise NotImplementedError

    @property
    def layout(self) -> str:
        """What that is called."""
        raise NotImplementedError

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype in which scales are stored, if they are numbers of it."""
        raise NotImplementedError

    def grid_of(self, linear: Linear) -> Grid | str:
        """The grid of a linear's codes, or why there is none."""
        raise NotImplementedError

    def qtensor(self, name: str) -> QTensor:
        """A quantized weight by its name, of a linear that has a grid.

        Raises:
            CheckpointError: a tensor of it is absent or misshapen.
        """
        raise NotImplementedError

    def report(self) -> dict[str, Any]:
        """What is said of how the weights were made; empty where nothing is.

        Raises:
            CheckpointError: it is damaged.
        """
        return {}

    def folded(self) -> dict[str, bytes]:
        """Files of scales that were folded into the weights, by their names in a build."""
        return {}

    def cache_scales(self, attention: str) -> tuple[Tensor, Tensor]:
        """The scales of a layer's keys and values that are stored, each one number.

        Raises:
            CheckpointError: one is missing.
        """
        raise CheckpointError(f"{attention}: has no scales of a cache.", hint="Quantize with --kv-cache fp8.")

    def is_dequantized(self, name: str) -> bool:
        """Whether it has codes."""
        return name in self.linears

    def plainly(self, names: Iterable[str]) -> Self:
        """The same, some weights in the dtype of the model's plain ones, where every number is one of that."""
        dtype, changed = self.entry(self.architecture.final_norm.weight).dtype, {}
        for name in names:
            entry = self.entry(name)
            if all(stored_as(block, dtype) is not None for block in self.blocks(name)):
                changed[name] = replace(entry, dtype=dtype, nbytes=dtype.itemsize * entry.numel)
        return replace(self, entries={**self.entries, **changed})

    def is_made_of(self, name: str, weight: QTensor) -> bool:
        """See :class:`qconv.verification.weights.Coded`."""
        linear = self.linears.get(name)
        known = linear is not None and isinstance(self.grid_of(linear), Grid)
        return known and self.dtype is torch.float32 and same_numbers(self.qtensor(name), weight)


@dataclass(frozen=True, slots=True)
class BuildWeights(CodedWeights):
    """Those of a build.

    Attributes:
        build: The build.
        parts: The stored tensors that each is made of, by the same names.
    """

    build: Build
    parts: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, build: Build, dtype: torch.dtype = torch.float32) -> BuildWeights:
        """Of an open build."""
        stored = build.checkpoint
        linears = {
            linear.weight: linear
            for layer in build.architecture.layers
            for linear in layer.linears()
            if build.is_quantized(linear)
        }
        parts = {
            name: tuple(
                spec.name
                for spec in build.format.specs(
                    linear.name, linear.out_features, linear.in_features, build.grid_of(linear)
                )
                if spec.name in stored.entries
            )
            for name, linear in linears.items()
        }
        held = {part for of in parts.values() for part in of}
        entries: dict[str, TensorEntry] = {name: one for name, one in stored.entries.items() if name not in held}
        for name in [name for name in entries if stored.is_dequantized(name)]:
            entry = entries[name]
            entries[name] = replace(entry, dtype=dtype, nbytes=dtype.itemsize * entry.numel)
        for name, linear in linears.items():
            shape = (linear.out_features, linear.in_features)
            some = stored.entry(parts[name][0])
            nbytes = dtype.itemsize * linear.out_features * linear.in_features
            entries[name] = replace(some, name=name, dtype=dtype, shape=shape, nbytes=nbytes, strides=())
        config = strip_quantization(stored.config)
        return cls(entries, stored.path, config, linears, dtype, build.architecture, build, parts)

    @property
    def format(self) -> Format:
        """The build's."""
        return self.build.format

    @property
    def layout(self) -> str:
        """The name of its format."""
        return self.build.format.name

    @property
    def scale_dtype(self) -> torch.dtype:
        """That of the model's plain weights."""
        stored = self.build.checkpoint
        ends = (self.architecture.embedding, self.architecture.final_norm)
        return next(stored.entry(one.weight).dtype for one in ends if not stored.is_dequantized(one.weight))

    def grid_of(self, linear: Linear) -> Grid:
        """As the build has it; where its biases are zero points, the grid with those."""
        grid = self.build.grid_of(linear)
        return self.qtensor(linear.weight).grid if grid.based else grid

    def report(self) -> dict[str, Any]:
        """The build's own."""
        return read_report(self.build.path) if has_report(self.build.path) else {}

    def folded(self) -> dict[str, bytes]:
        """Those of its layers."""
        files = sorted((self.build.path / SCALES_FOLDER).glob("*.safetensors"))
        return {f"{SCALES_FOLDER}/{file.name}": file.read_bytes() for file in files}

    def cache_scales(self, attention: str) -> tuple[Tensor, Tensor]:
        """As the build stores them."""
        naming = self.build.format.cache
        assert naming is not None
        stored = self.build.checkpoint
        key, value = (stored.read(f"{attention}.{leaf}").reshape(1) for leaf in (naming.key, naming.value))
        return key, value

    @property
    def files(self) -> list[Path]:
        """The build's shards."""
        return self.build.checkpoint.files

    def fingerprint(self) -> str:
        """That of the build, whose samples are of codes and scales alike."""
        return self.build.checkpoint.fingerprint()

    def qtensor(self, name: str) -> QTensor:
        """A quantized weight by its name.

        Raises:
            CheckpointError: a tensor of it is absent or misshapen.
        """
        weight = self.build.qtensor(self.linears[name])
        return weight if weight.biases is None else with_zero_points(weight) or weight

    def crc32(self, name: str, value: int = 0) -> int:
        """Of the stored tensors that a weight is made of."""
        for part in self.parts.get(name, (name,)):
            value = self.build.checkpoint.crc32(part, value)
        return value

    def read(self, name: str) -> Tensor:
        """The dense tensor."""
        if name not in self.linears:
            return self.build.checkpoint.read(name).to(self.entry(name).dtype)
        return self.qtensor(name).dequantize(self.entry(name).dtype)

    def blocks(self, name: str, multiple: int = 1) -> Iterator[Tensor]:
        """The dense tensor as consecutive blocks of rows; memory holds one of them, and the weight's codes."""
        if name not in self.linears:
            dtype = self.entry(name).dtype
            yield from (block.to(dtype) for block in self.build.checkpoint.blocks(name, multiple))
            return
        weight = self.qtensor(name)
        sharing = weight.grid.rows_sharing(len(weight.codes))
        for start, stop in row_ranges(self.entry(name), max(multiple, sharing)):
            yield weight.rows(start, stop).dequantize(self.entry(name).dtype)

    def gather(self, name: str, rows: Tensor) -> Tensor:
        """Chosen rows of the dense tensor, [len(rows), columns]."""
        if name in self.linears:
            return self.read(name)[rows]
        return self.build.checkpoint.gather(name, rows).to(self.entry(name).dtype)


def source_of(build: Build, dtype: torch.dtype = torch.float32) -> Source:
    """A build as what another one is made from, its weights in a dtype.

    Raises:
        CheckpointError: it lacks a tokenizer, or tensors beside the model share bytes.
    """
    require_tokenizer(build.path)
    return Source(BuildWeights.of(build, dtype), build.architecture, False, build.verbatim())
