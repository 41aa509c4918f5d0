"""A build as the dense checkpoint that it stands for, every weight code times scale in float32, cast once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qconv.artifacts.build import Build
from qconv.artifacts.layout import strip_quantization
from qconv.artifacts.source import Source, require_tokenizer
from qconv.checkpoint.header import TensorEntry
from qconv.checkpoint.reader import Checkpoint, row_ranges
from qconv.conversion.exact import same_numbers
from qconv.core.architecture import Linear
from qconv.core.qtensor import QTensor


@dataclass(frozen=True, slots=True)
class BuildWeights(Checkpoint):
    """The dense view: same names, no scales, no ``quantization_config``.

    Attributes:
        build: The build.
        linears: Its quantized linears by their weights' names.
        dtype: What weights are cast to.
        parts: The stored tensors that each is made of, by the same names.
    """

    build: Build
    linears: Mapping[str, Linear]
    dtype: torch.dtype
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
        for name, linear in linears.items():
            shape = (linear.out_features, linear.in_features)
            some = stored.entry(parts[name][0])
            nbytes = dtype.itemsize * linear.out_features * linear.in_features
            entries[name] = replace(some, name=name, dtype=dtype, shape=shape, nbytes=nbytes)
        return cls(entries, stored.path, strip_quantization(stored.config), build, linears, dtype, parts)

    @property
    def files(self) -> list[Path]:
        """The build's shards."""
        return self.build.checkpoint.files

    def is_dequantized(self, name: str) -> bool:
        """Whether it has codes."""
        return name in self.linears

    def fingerprint(self) -> str:
        """That of the build, whose samples are of codes and scales alike."""
        return self.build.checkpoint.fingerprint()

    def qtensor(self, name: str) -> QTensor:
        """A quantized weight by its name.

        Raises:
            CheckpointError: a tensor of it is absent or misshapen.
        """
        return self.build.qtensor(self.linears[name])

    def is_made_of(self, name: str, weight: QTensor) -> bool:
        """See :class:`qconv.verification.weights.Coded`."""
        return self.dtype is torch.float32 and same_numbers(self.qtensor(name), weight)

    def crc32(self, name: str, value: int = 0) -> int:
        """Of the stored tensors that a weight is made of."""
        for part in self.parts.get(name, (name,)):
            value = self.build.checkpoint.crc32(part, value)
        return value

    def read(self, name: str) -> Tensor:
        """The dense tensor."""
        if name not in self.linears:
            return self.build.checkpoint.read(name)
        return self.qtensor(name).dequantize(self.dtype)

    def blocks(self, name: str, multiple: int = 1) -> Iterator[Tensor]:
        """The dense tensor as consecutive blocks of rows; memory holds one of them, and the weight's codes."""
        if name not in self.linears:
            yield from self.build.checkpoint.blocks(name, multiple)
            return
        weight = self.qtensor(name)
        sharing = weight.grid.rows_sharing(len(weight.codes))
        for start, stop in row_ranges(self.entry(name), max(multiple, sharing)):
            yield weight.rows(start, stop).dequantize(self.dtype)

    def gather(self, name: str, rows: Tensor) -> Tensor:
        """Chosen rows of the dense tensor, [len(rows), columns]."""
        return self.build.checkpoint.gather(name, rows) if name not in self.linears else self.read(name)[rows]


def source_of(build: Build, dtype: torch.dtype = torch.float32) -> Source:
    """A build as what another one is made from, its weights in a dtype.

    Raises:
        CheckpointError: it lacks a tokenizer, or tensors beside the model share bytes.
    """
    require_tokenizer(build.path)
    return Source(BuildWeights.of(build, dtype), build.architecture, False, build.verbatim())
