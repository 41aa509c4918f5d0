"""A finished safetensors file read back once, from its start to its end, straight from the disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from qconv.checkpoint.direct import read_blocks
from qconv.checkpoint.header import TensorEntry, read_header
from qconv.errors import VerificationError


class TensorStream:
    """The tensors of a file in file order; the whole file's checksum comes out at the end."""

    def __init__(self, path: Path) -> None:
        """Open a file and read its header.

        Raises:
            CheckpointError: the header is malformed.
            OSError: the file cannot be read.
        """
        self._path = path
        self._entries = iter(read_header(path).values())
        self._entry: TensorEntry | None = None
        self._left = 0
        self._digest = hashlib.sha256()
        self._blocks = read_blocks(path)
        self._block = memoryview(b"")
        self._position = 0

    def begin(self, name: str) -> TensorEntry:
        """Go on to the next tensor.

        Raises:
            VerificationError: it is not the one expected, or the last one was not read to its end.
        """
        entry = next(self._entries, None)
        if entry is None or entry.name != name or self._left:
            raise VerificationError(f"{self._path}: expected tensor {name!r} next.", hint="This is a bug in qconv.")
        if self._position < entry.offset:
            self._take(entry.offset - self._position)
        self._entry, self._left = entry, entry.nbytes
        return entry

    def rows(self, count: int) -> Tensor:
        """The next ``count`` rows of the tensor begun, a copy in memory; of one number the only one.

        Raises:
            VerificationError: the file ends before.
        """
        assert self._entry is not None
        entry = self._entry
        if not entry.shape:
            self._left = 0
            return self._take(entry.nbytes).view(entry.dtype).view(())
        size = count * (entry.nbytes // max(entry.shape[0], 1))
        self._left -= size
        return self._take(size).view(entry.dtype).view(count, *entry.shape[1:])

    def tensor(self, name: str) -> Tensor:
        """The next tensor as a whole.

        Raises:
            VerificationError: it is not the one expected, or the file ends before.
        """
        return self.rows((*self.begin(name).shape, 1)[0])

    def sha256(self) -> str:
        """The checksum of the whole file, hexadecimal, once everything was read.

        Raises:
            OSError: the file cannot be read.
        """
        for block in self._rest():
            self._digest.update(block)
        return self._digest.hexdigest()

    def _rest(self) -> Iterator[memoryview]:
        yield self._block
        yield from self._blocks

    def _take(self, size: int) -> Tensor:
        taken = torch.empty(size, dtype=torch.uint8)
        target = taken.numpy().data
        filled = 0
        while filled < size:
            if not len(self._block):
                # A block's buffer is used again for the next one: nothing may hold on to it.
                self._block = next(self._blocks, memoryview(b""))
                if not len(self._block):
                    raise VerificationError(f"{self._path}: ends early.", hint="The disk is faulty.")
            count = min(size - filled, len(self._block))
            part = self._block[:count]
            target[filled : filled + count] = part
            self._digest.update(part)
            self._block = self._block[count:]
            filled += count
        self._position += size
        return taken


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes: a zero's sign counts, and a NaN equals itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    first, second = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)
