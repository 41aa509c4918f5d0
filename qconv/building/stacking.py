"""Tensors of single modules on their way into those that hold several: a scratch file keeps them until all are there.

Modules come one after the other, each with all of its tensors; a file wants one tensor of all modules after the other.
Memory holds those of one place at a time.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qconv.checkpoint.header import TensorSpec
from qconv.checkpoint.writer import output_errors
from qconv.errors import VerificationError
from qconv.formats.stacks import Stack


class Stacking:
    """What goes into the stacks of a unit."""

    def __init__(self, stacks: Sequence[Stack], path: Path) -> None:
        """Begin.

        Args:
            stacks: The tensors that are to be made.
            path: A file for what waits; made when the first comes, removed by :meth:`close`.
        """
        self._path = path
        self._specs: dict[str, TensorSpec] = {}
        self._offsets: dict[str, int] = {}
        self._checksums: dict[str, int] = {}
        self._descriptor: int | None = None
        offset = 0
        for spec in (spec for stack in stacks for spec in stack.members):
            self._specs[spec.name], self._offsets[spec.name] = spec, offset
            offset += spec.nbytes

    def takes(self, name: str) -> bool:
        """Whether a tensor becomes a part of a stack."""
        return name in self._specs

    def add(self, name: str, blocks: Iterable[Tensor]) -> None:
        """Keep a tensor, given as consecutive blocks of its rows.

        Raises:
            ValueError: it has another dtype or size than was announced.
            OutputError: the disk is full or the file cannot be written.
        """
        spec, offset, checksum = self._specs[name], self._offsets[name], 0
        with output_errors(self._path):
            if self._descriptor is None:
                self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            for block in blocks:
                if block.dtype != spec.dtype:
                    raise ValueError(f"expected {spec}, got {block.dtype}")
                if not block.numel():
                    continue
                data = memoryview(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                checksum = zlib.crc32(data, checksum)
                while data:
                    written = os.pwrite(self._descriptor, data, offset)
                    data, offset = data[written:], offset + written
        if offset - self._offsets[name] != spec.nbytes:
            raise ValueError(f"{name}: {offset - self._offsets[name]} bytes, not {spec.nbytes}")
        self._checksums[name] = checksum

    def blocks(self, stack: Stack) -> Iterator[Tensor]:
        """A stack's consecutive blocks, one a place, each [1, ...].

        Raises:
            ValueError: one of its parts did not come.
            VerificationError: what was read back is not what was kept.
            OutputError: the file cannot be read.
        """
        for first in range(0, len(stack.members), stack.halves):
            yield stack.together([self._read(spec) for spec in stack.members[first : first + stack.halves]])

    def _read(self, spec: TensorSpec) -> Tensor:
        if spec.name not in self._checksums or self._descriptor is None:
            raise ValueError(f"{spec.name}: was not written")
        data, filled = torch.empty(spec.nbytes, dtype=torch.uint8), 0
        view = memoryview(data.numpy().data)
        with output_errors(self._path):
            while filled < spec.nbytes:
                count = os.preadv(self._descriptor, [view[filled:]], self._offsets[spec.name] + filled)
                if not count:
                    break
                filled += count
        if zlib.crc32(view) != self._checksums[spec.name]:
            raise VerificationError(
                f"{self._path}: what was read back of {spec.name} differs from what was written.",
                hint="The disk or the memory is faulty; do not trust this machine's output.",
            )
        return data.view(spec.dtype).view(spec.shape)

    def close(self) -> None:
        """Remove the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            self._path.unlink(missing_ok=True)
