"""A safetensors shard, written as a stream and published only when what is on disk is what was meant.

The header is known before the first byte, so tensors go straight to the file and memory holds one of them at a time.
The file lives under a temporary name until :meth:`ShardWriter.publish`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from qconv.checkpoint.direct import DirectWriter, read_blocks
from qconv.checkpoint.header import TensorSpec, encode_header, read_header
from qconv.errors import OutputError, VerificationError

TEMPORARY_SUFFIX = ".partial"


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A finished file: its name, size in bytes and sha256 (hexadecimal)."""

    name: str
    size: int
    sha256: str


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn an operating system error on an output file into an :class:`OutputError` that names file and remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"{path}: the disk is full.", hint="Free some space; the same command continues where it stopped."
            ) from error
        raise OutputError(
            f"{path}: cannot write: {error.strerror}.", hint="The same command continues once this is repaired."
        ) from error


def sha256_of(path: Path) -> str:
    """sha256 of a file as the disk holds it, hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    for block in read_blocks(path):
        digest.update(block)
    return digest.hexdigest()


def is_same(path: Path, size: int, sha256: str) -> bool:
    """Whether a path is a file that holds what it should.

    Raises:
        OutputError: it cannot be read.
    """
    with output_errors(path):
        return path.is_file() and path.stat().st_size == size and sha256_of(path) == sha256


def sync_folder(path: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes, temporary: Path | None = None) -> None:
    """Replace ``path`` by ``data`` so that after a crash it holds either the old bytes or the new.

    Args:
        path: The file.
        data: What it will hold.
        temporary: Where it is written first, on the same file system; beside it by default.

    Raises:
        OutputError: disk full, read-only ...
    """
    temporary = temporary or path.with_name(path.name + TEMPORARY_SUFFIX)
    with output_errors(path):
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        sync_folder(path.parent)


class StagedFile(ABC):
    """A file that is written as a stream under a temporary name, read back, and only then given its own.

    Use as a context manager: leaving it before :meth:`publish` removes the temporary file. A subclass appends the
    tensors after the header and says in :attr:`missing` how many are yet to come.
    """

    def __init__(self, path: Path, header: bytes, temporary: Path | None = None) -> None:
        """Open the temporary file, on the same file system and by default beside the final one; write the header.

        Raises:
            OutputError: the file cannot be created or the disk is full.
        """
        self.path = path
        self.temporary = temporary or path.with_name(path.name + TEMPORARY_SUFFIX)
        self._digest = hashlib.sha256()
        self._published = False
        with output_errors(path):
            self._file = DirectWriter(self.temporary)
        try:
            self._append(header)
        except OutputError:
            self.__exit__(None, None, None)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if not self._published:
            self.temporary.unlink(missing_ok=True)

    @property
    @abstractmethod
    def missing(self) -> int:
        """Tensors that were not written yet."""

    @property
    def complete(self) -> bool:
        """Whether every tensor was written."""
        return self.missing == 0

    def seal(self) -> ShardRecord:
        """Wait until the file is on disk and close it; it keeps its temporary name.

        Raises:
            OutputError: the disk is full or the file cannot be written.
        """
        if not self.complete:
            raise ValueError(f"{self.path.name}: {self.missing} tensors were not written")
        with output_errors(self.path):
            self._file.finish()
        return ShardRecord(self.path.name, self._file.size, self._digest.hexdigest())

    def require_same(self, sha256: str) -> None:
        """Check the checksum of the file as it was read back.

        Raises:
            VerificationError: it is not that of what was written.
        """
        if sha256 != self._digest.hexdigest():
            raise VerificationError(
                f"{self.temporary}: what was read back differs from what was written.",
                hint="The disk or the memory is faulty; do not trust this machine's output.",
            )

    def finish(self) -> ShardRecord:
        """:meth:`seal`, read the file back and compare.

        Raises:
            OutputError: the disk is full or the file cannot be written.
            VerificationError: what was read back is not what was written.
        """
        record = self.seal()
        with output_errors(self.path):
            self.require_same(sha256_of(self.temporary))
        return record

    def publish(self) -> None:
        """Give the finished file its final name, durably.

        Raises:
            OutputError: the rename failed.
        """
        with output_errors(self.path):
            self.temporary.rename(self.path)
            self._published = True
            sync_folder(self.path.parent)

    def commit(self) -> ShardRecord:
        """:meth:`finish`, :meth:`publish` and close."""
        with self:
            record = self.finish()
            self.publish()
        return record

    def _append(self, data: bytes | memoryview) -> None:
        with output_errors(self.path):
            self._file.write(data)
        self._digest.update(data)


class ShardWriter(StagedFile):
    """Writes the tensors of ``specs``, in that order, to ``path``."""

    def __init__(
        self, path: Path, specs: Sequence[TensorSpec], temporary: Path | None = None, framework: str = "pt"
    ) -> None:
        """Open the temporary file, as :class:`StagedFile` does, and write the header.

        Raises:
            OutputError: the file cannot be created or the disk is full.
        """
        self._specs = list(specs)
        self._next = 0
        super().__init__(path, encode_header(self._specs, framework), temporary)

    @property
    def specs(self) -> Sequence[TensorSpec]:
        """The tensors of the file, in file order."""
        return self._specs

    @property
    def missing(self) -> int:
        """Tensors that were not written yet."""
        return len(self._specs) - self._next

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor.

        Raises:
            ValueError: not the tensor that comes next, or of another dtype or shape than announced.
            OutputError: the disk is full or the file cannot be written.
        """
        self.write_blocks(name, [tensor])

    def write_blocks(self, name: str, blocks: Iterable[Tensor]) -> None:
        """Append the next tensor, given as consecutive blocks of its rows.

        Raises:
            ValueError: not the tensor that comes next, or of another dtype or shape than announced.
            OutputError: the disk is full or the file cannot be written.
        """
        if self.complete:
            raise ValueError(f"{name}: the shard is complete")
        spec = self._specs[self._next]
        nbytes = 0
        for block in blocks:
            if (name, block.dtype, tuple(block.shape[1:])) != (spec.name, spec.dtype, spec.shape[1:]):
                raise ValueError(f"expected {spec}, got {name} {block.dtype} {tuple(block.shape)}")
            nbytes += block.nbytes
            if block.numel():
                self._append(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if nbytes != spec.nbytes:
            raise ValueError(f"{name}: {nbytes} bytes, not {spec.nbytes}")
        self._next += 1

    def finish(self) -> ShardRecord:
        """As :meth:`StagedFile.finish`; the header must be readable too.

        Raises:
            OutputError: the disk is full or the file cannot be written.
            VerificationError: what was read back is not what was written.
        """
        record = super().finish()
        read_header(self.temporary)
        return record
