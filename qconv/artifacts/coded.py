"""A build in one of the layouts that qconv writes as a source: read as the dense weights that it stands for.

What reads a build to verify it reads it here: codes times scales in float32, rounded once to the model's dtype. Block
FP8, packed integers and gpt-oss's MXFP4, which models are published in, have readers of their own that hold a few rows
at a time; here memory holds one weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qconv.artifacts.build import Build
from qconv.artifacts.layout import strip_quantization
from qconv.checkpoint.fp8 import ACTIVATION_LEAVES, is_cache_scale
from qconv.checkpoint.header import TensorEntry
from qconv.checkpoint.quantized import QuantizedCheckpoint
from qconv.checkpoint.reader import Checkpoint, row_ranges
from qconv.core.architecture import Linear
from qconv.core.qtensor import Grid
from qconv.errors import CheckpointError
from qconv.formats import Format
from qconv.formats.base import Described

_SIDE = 1 << 12
"""Of the square matrix by which sizes are told: every group divides it."""


@dataclass(frozen=True, slots=True)
class CodedCheckpoint(QuantizedCheckpoint):
    """The dense view of a build.

    Attributes:
        build: The build.
        linears: Its quantized linears by their weights' names.
    """

    build: Build
    linears: Mapping[str, Linear]

    @property
    def kind(self) -> str:
        """The layout."""
        return f"codes of format {self.build.format.name.replace('_', '-')}"

    @classmethod
    def of(cls, stored: Checkpoint, dtype: torch.dtype) -> CodedCheckpoint:
        """Of an open checkpoint.

        Args:
            stored: The checkpoint, with tensors for each expert.
            dtype: The dtype that weights are rounded to.

        Raises:
            CheckpointError: as :meth:`Build.of`; or a weight lacks a part of it, or none is quantized.
        """
        build = Build.of(stored)
        linears = {
            linear.weight: linear
            for layer in build.architecture.layers
            for linear in layer.linears()
            if build.is_quantized(linear)
        }
        parts = {name: _parts(build, linear) for name, linear in linears.items()}
        if not parts:
            raise CheckpointError(
                f"{stored.path}: config.json says {build.format.name}, but no linear has codes.",
                hint="config.json belongs to another checkpoint.",
            )
        held = {entry.name for of in parts.values() for entry in of}
        modules = {linear.name for linear in linears.values()}
        ignored = {name for name in stored.entries if name not in held and _says_nothing(name, modules)}
        entries = {name: one for name, one in stored.entries.items() if name not in held | ignored}
        for name in [name for name in entries if stored.is_dequantized(name)]:
            entries[name] = _dense(entries[name], name, entries[name].shape, dtype)
        for name, linear in linears.items():
            entries[name] = _dense(parts[name][0], name, (linear.out_features, linear.in_features), dtype)
        config = strip_quantization(stored.config)
        codes = {name: of[0] for name, of in parts.items()}
        others = {name: of[1:] for name, of in parts.items()}
        return cls(entries, stored.path, config, stored, codes, {}, others, tuple(sorted(ignored)), build, linears)

    def made_of(self, name: str) -> tuple[TensorEntry, ...]:
        """The stored tensors that a quantized weight is made of."""
        return self.codes[name], *self.others[name]

    def read(self, name: str) -> Tensor:
        """The dense tensor.

        Raises:
            CheckpointError: a part of it is damaged.
        """
        dtype = self.entry(name).dtype
        if name not in self.linears:
            found = self.stored.read(name)
            return found.to(dtype) if self.stored.is_dequantized(name) else found
        return self.build.qtensor(self.linears[name]).dequantize(dtype)

    def blocks(self, name: str, multiple: int = 1) -> Iterator[Tensor]:
        """The dense tensor as consecutive blocks of rows; memory holds one of them, and the weight's codes."""
        dtype = self.entry(name).dtype
        if name not in self.linears:
            dequantized = self.stored.is_dequantized(name)
            for block in self.stored.blocks(name, multiple):
                yield block.to(dtype) if dequantized else block
            return
        weight = self.build.qtensor(self.linears[name])
        sharing = weight.grid.rows_sharing(len(weight.codes))
        for start, stop in row_ranges(self.entry(name), math.lcm(multiple, sharing)):
            yield weight.rows(start, stop).dequantize(dtype)

    def gather(self, name: str, rows: Tensor) -> Tensor:
        """Chosen rows of the dense tensor, [len(rows), columns]."""
        if name in self.linears:
            return self.read(name)[rows]
        return self.stored.gather(name, rows).to(self.entry(name).dtype)

    def _dense(self, name: str, codes: Tensor, rows: Tensor) -> Tensor:
        return self.read(name)[rows]


def _dense(entry: TensorEntry, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> TensorEntry:
    nbytes = math.prod(shape) * dtype.itemsize
    return replace(entry, name=name, dtype=dtype, shape=shape, nbytes=nbytes, strides=())


def _parts(build: Build, linear: Linear) -> tuple[TensorEntry, ...]:
    """The tensors that a weight is made of, codes first.

    Raises:
        CheckpointError: one is missing.
    """
    found = []
    for spec in build.expected_parts(linear):
        entry = build.checkpoint.entries.get(spec.name)
        if entry is None:
            raise CheckpointError(
                f"{build.path}: tensor {spec.name!r} is missing.",
                hint="The build is incomplete, or config.json belongs to another one.",
            )
        found.append(entry)
    return tuple(found)


def _says_nothing(name: str, modules: set[str]) -> bool:
    """Whether a tensor concerns activations or a cache."""
    module, _, leaf = name.rpartition(".")
    return is_cache_scale(name) or (module in modules and leaf in (*ACTIVATION_LEAVES, "g_idx", "weight_g_idx"))


@dataclass(frozen=True, slots=True)
class StoredCodes:
    """See :class:`qconv.artifacts.storage.Storage`."""

    format: Format
    described: Described

    @property
    def name(self) -> str:
        """The format's."""
        return self.format.name.replace("_", "-")

    @property
    def said(self) -> str:
        """The same in words."""
        return f"format {self.name}"

    @property
    def marks(self) -> tuple[str, ...]:
        """What stands beside or for a weight on any of its grids, and never beside a plain one."""
        return tuple(dict.fromkeys(leaf for grid in self._grids() for leaf in self._leaves(grid) if leaf != "weight"))

    @property
    def leaves(self) -> tuple[str, ...]:
        """With scales of activations."""
        return (*self.marks, *ACTIVATION_LEAVES, "input_global_scale")

    def codes(self, weight: str) -> str:
        """What a weight's codes are called."""
        return f"{weight.removesuffix('weight')}{self._leaves(self._grid(weight))[0]}"

    def nbytes(self, shape: tuple[int, ...], weight: str = "") -> int:
        """By its own grid, or of no name by the first."""
        rows, columns = math.prod(shape[:-1]), shape[-1]
        return sum(spec.nbytes for spec in self.format.specs("x", rows, columns, self._grid(weight)))

    def read(self, stored: Checkpoint, dtype: torch.dtype) -> CodedCheckpoint:
        """See :class:`CodedCheckpoint`."""
        return CodedCheckpoint.of(stored, dtype)

    def _grid(self, weight: str) -> Grid:
        module = weight.removesuffix(".weight")
        return self.described.grids([module]).get(module, self.described.grid)

    def _grids(self) -> list[Grid]:
        return list(dict.fromkeys(group.grid for group in self.described.groups))

    def _leaves(self, grid: Grid) -> list[str]:
        """The leaf names of a weight's tensors, codes first."""
        return [spec.name.removeprefix("x.") for spec in self.format.specs("x", _SIDE, _SIDE, grid)]
