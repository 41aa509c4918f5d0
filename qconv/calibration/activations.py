"""Activations between layers, on disk: 262,144 tokens of hidden size 6144 need 3.2 GB of file and little memory.

Every access maps the file for its own duration, so that pages leave the process as soon as they were used and resident
memory holds one window.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from qconv.checkpoint.writer import output_errors, sha256_of
from qconv.core.devices import CPU
from qconv.folders.ownership import claim

WINDOW_TOKENS = 4096
"""Rows that a pass over a file holds at once."""


class ActivationFile:
    """A matrix [tokens, width] in a file, or some of the rows of one."""

    def __init__(
        self,
        path: Path,
        tokens: int,
        width: int,
        dtype: torch.dtype,
        first: int = 0,
        computed: torch.dtype = torch.float32,
    ) -> None:
        """Describe a file that exists or that :meth:`create` will make.

        Args:
            path: The file.
            tokens, width: Of the matrix.
            dtype: In which the file holds it.
            first: Rows that it holds before these.
            computed: In which rows are handed out.
        """
        self.path = path
        self.tokens = tokens
        self.width = width
        self.dtype = dtype
        self.computed = computed
        self._first = first
        self._row_bytes = width * dtype.itemsize

    def part(self, first: int, tokens: int) -> ActivationFile:
        """So many of its rows, from ``first`` on; the file is made and sealed as a whole."""
        return ActivationFile(self.path, tokens, self.width, self.dtype, self._first + first, self.computed)

    @property
    def nbytes(self) -> int:
        """The file's size."""
        return self.tokens * self._row_bytes

    def create(self) -> ActivationFile:
        """Make the file, zeroed, its blocks allocated so that a full disk shows now and not as a bus error later.

        Raises:
            OutputError: the disk is full or the file cannot be made.
        """
        claim(self.path)
        with output_errors(self.path), self.path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(self.nbytes, 1))
            file.truncate(self.nbytes)
        return self

    def read(self, start: int, stop: int, device: torch.device = CPU) -> Tensor:
        """Rows ``start:stop`` in the dtype of computation, [stop - start, width], a copy on a device."""
        rows = self._window(start, stop)
        # They cross the bus in the file's dtype.
        return rows.to(self.computed, copy=True) if device == CPU else rows.to(device).to(self.computed)

    def write(self, start: int, rows: Tensor) -> None:
        """Store rows of any device from ``start`` on, rounded to the file's dtype."""
        self._window(start, start + len(rows)).copy_(rows if rows.device == CPU else rows.to(self.dtype))

    def gather(self, index: Tensor, device: torch.device = CPU) -> Tensor:
        """Chosen rows in the dtype of computation, [len(index), width], on a device; ``index`` is int64, the host's."""
        return self._window(0, self.tokens).index_select(0, index).to(device).to(self.computed)

    def add(self, index: Tensor, rows: Tensor) -> None:
        """Add ``rows`` of any device to chosen rows, each at most once."""
        self._window(0, self.tokens).index_add_(0, index, rows.cpu().to(self.dtype))

    def windows(self, rows: int = WINDOW_TOKENS) -> Iterator[tuple[int, int]]:
        """Consecutive ranges of rows."""
        for start in range(0, self.tokens, rows):
            yield start, min(start + rows, self.tokens)

    def seal(self) -> str:
        """Flush the file to disk; its sha256.

        Raises:
            OutputError: the disk failed.
        """
        with output_errors(self.path):
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
            return sha256_of(self.path)

    def _window(self, start: int, stop: int) -> Tensor:
        begin, end = (self._first + start) * self._row_bytes, (self._first + stop) * self._row_bytes
        page = begin - begin % mmap.ALLOCATIONGRANULARITY
        with output_errors(self.path), self.path.open("r+b") as file:
            view = mmap.mmap(file.fileno(), end - page, offset=page)
        flat = torch.frombuffer(view, dtype=self.dtype, count=(stop - start) * self.width, offset=begin - page)
        return flat.view(stop - start, self.width)


class ResidentActivations(ActivationFile):
    """Such a matrix in a device's memory: what is made within a layer, and made again after a crash.

    Rows for other devices cross the bus between them.
    """

    def __init__(
        self,
        file: ActivationFile,
        device: torch.device,
        data: Tensor | None = None,
    ) -> None:
        """Take the place of a file that need not exist; its rows hold nothing yet.

        Args:
            file: Whose place.
            device: Where.
            data: The rows, where they are part of others.
        """
        super().__init__(file.path, file.tokens, file.width, file.dtype, computed=file.computed)
        self._device = device
        shape = (file.tokens, file.width)
        self._data = torch.empty(shape, dtype=file.dtype, device=device) if data is None else data

    def part(self, first: int, tokens: int) -> ActivationFile:
        """So many of its rows, from ``first`` on."""
        part = ActivationFile(self.path, tokens, self.width, self.dtype, computed=self.computed)
        return ResidentActivations(part, self._device, self._data[first : first + tokens])

    def create(self) -> ActivationFile:
        """Nothing: the memory is there."""
        return self

    def read(self, start: int, stop: int, device: torch.device = CPU) -> Tensor:
        """See :meth:`ActivationFile.read`."""
        return self._data[start:stop].to(device, copy=True).to(self.computed)

    def write(self, start: int, rows: Tensor) -> None:
        """See :meth:`ActivationFile.write`."""
        self._data[start : start + len(rows)].copy_(rows)

    def gather(self, index: Tensor, device: torch.device = CPU) -> Tensor:
        """See :meth:`ActivationFile.gather`."""
        return self._data.index_select(0, index.to(self._device)).to(device).to(self.computed)

    def add(self, index: Tensor, rows: Tensor) -> None:
        """See :meth:`ActivationFile.add`."""
        self._data.index_add_(0, index.to(self._device), rows.to(self._device).to(self.dtype))


class SetAside:
    """Rows of a matrix with the tokens they belong to, in a file without a name until their turn comes.

    An expert that sees 16,384 tokens at hidden size 6144 has 400 MB of outputs; several wait at a time for the experts
    before them.
    """

    def __init__(
        self, folder: Path, width: int, windows: Iterable[tuple[Tensor, Tensor]], dtype: torch.dtype = torch.float32
    ) -> None:
        """Write windows of tokens, int64 [n], and their rows, [n, width] of a dtype, on any device.

        Raises:
            OutputError: the disk is full or the folder cannot be written.
        """
        self._folder = folder
        self._width = width
        self._dtype = dtype
        self._tokens: list[Tensor] = []
        with output_errors(folder):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - read later
        weakref.finalize(self, self._file.close)
        with output_errors(folder):
            for tokens, rows in windows:
                self._file.write(rows.contiguous().cpu().numpy().data)
                self._tokens.append(tokens)
            self._file.flush()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The windows as they came."""
        self._file.seek(0)
        for tokens in self._tokens:
            rows = torch.empty(len(tokens), self._width, dtype=self._dtype, device=CPU)
            with output_errors(self._folder):
                self._file.readinto(rows.numpy().data)
            yield tokens, rows
