"""A checkpoint whose weights are stored quantized, read as the dense one that it stands for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qconv.checkpoint.header import TensorEntry
from qconv.checkpoint.reader import Checkpoint, map_rows, map_tensor, row_ranges


@dataclass(frozen=True, slots=True)
class QuantizedCheckpoint(Checkpoint):
    """The dense view: same names, no scales, no ``quantization_config``; a subclass knows what codes mean.

    A weight is computed in float32 and rounded once to its entry's dtype. An entry's ``dtype`` and ``nbytes`` are those
    of the dense tensor.

    Attributes:
        stored: The checkpoint as its files have it.
        codes: Where the codes of each quantized weight lie, by the weight's name; a row of codes is one of the weight.
        scales: Where its scales lie, by the same name.
        others: What else it is made of, by the same name: zero points and the like.
        ignored: Tensors that say nothing about weights, sorted.
    """

    stored: Checkpoint
    codes: Mapping[str, TensorEntry]
    scales: Mapping[str, TensorEntry]
    others: Mapping[str, tuple[TensorEntry, ...]]
    ignored: tuple[str, ...]

    @property
    @abstractmethod
    def kind(self) -> str:
        """What its quantized weights are, in words."""

    @property
    def files(self) -> list[Path]:
        """The shards, those that hold scales alone included."""
        return self.stored.files

    def is_dequantized(self, name: str) -> bool:
        """Whether it has codes."""
        return name in self.codes

    def fingerprint(self) -> str:
        """That of the stored checkpoint, whose samples are of codes and scales alike."""
        return self.stored.fingerprint()

    def crc32(self, name: str, value: int = 0) -> int:
        """Of the stored tensors that a weight is made of.

        Raises:
            CheckpointError: as :meth:`read`.
        """
        if name not in self.codes:
            return self.stored.crc32(name, value)
        for entry in self.made_of(name):
            value = self.stored.crc32(entry.name, value)
        return value

    def read(self, name: str) -> Tensor:
        """The dense tensor.

        Raises:
            CheckpointError: as of any checkpoint, and where a scale is not finite.
        """
        if name not in self.codes:
            return self.stored.read(name)
        codes = map_tensor(self.codes[name])
        return self._dense(name, codes, torch.arange(len(codes)))

    def blocks(self, name: str, multiple: int = 1) -> Iterator[Tensor]:
        """The dense tensor as the consecutive blocks of rows that a dense checkpoint gives; memory holds one of them.

        Raises:
            CheckpointError: as :meth:`read`.
        """
        if name not in self.codes:
            yield from self.stored.blocks(name, multiple)
            return
        for start, stop in row_ranges(self.entry(name), multiple):
            yield self._dense(name, map_rows(self.codes[name], start, stop), torch.arange(start, stop))

    def gather(self, name: str, rows: Tensor) -> Tensor:
        """Chosen rows of the dense tensor, [len(rows), columns].

        Raises:
            CheckpointError: as :meth:`read`.
        """
        if name not in self.codes:
            return self.stored.gather(name, rows)
        return self._dense(name, self.stored.gather(self.codes[name].name, rows), rows)

    def made_of(self, name: str) -> tuple[TensorEntry, ...]:
        """The stored tensors that a quantized weight is made of: codes, scales, the rest."""
        return self.codes[name], self.scales[name], *self.others.get(name, ())

    @abstractmethod
    def _dense(self, name: str, codes: Tensor, rows: Tensor) -> Tensor:
        """What codes of the weight's rows numbered ``rows`` [n] stand for, [n, in_features] in the weight's dtype."""


def codes_of(stored: Checkpoint, leaf: str) -> dict[str, TensorEntry]:
    """Where the codes of quantized weights lie, by the weights' names.

    Args:
        stored: The checkpoint as its files have it.
        leaf: What codes are called in the place of ``weight``.
    """
    entries = stored.entries.items()
    return {f"{name.removesuffix(leaf)}weight": entry for name, entry in entries if name.endswith(f".{leaf}")}
