"""File access past the page cache, where the file system allows it.

A build is written once and read back once, so keeping it in the page cache costs memory and time and pushes out the
source, which is read again. Direct access (``O_DIRECT``) needs aligned buffers and offsets; where the file system
refuses it, the same calls go through the page cache. There are two buffers: the disk works on one while the caller
fills or empties the other.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

ALIGNMENT = 4096
"""Bytes to which offsets and lengths of direct access are aligned; no common file system or disk asks for more."""
BUFFER_BYTES = 8 * 2**20

_UNSUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP)


class DirectWriter:
    """Writes a new file from its start to its end.

    Use as a context manager: leaving it closes the file; :meth:`finish` makes it whole and durable first.
    """

    def __init__(self, path: Path) -> None:
        """Create or truncate the file.

        Raises:
            OSError: it cannot be created.
        """
        self._descriptor = _open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._buffer, self._spare = _buffers()
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._draining: Future[None] | None = None
        self._filled = 0
        self._written = 0
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Bytes taken so far."""
        return self._written + self._filled

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes.

        Raises:
            OSError: the disk is full or failed, now or with what was appended before.
        """
        view = memoryview(data)
        while len(view):
            count = min(len(view), BUFFER_BYTES - self._filled)
            self._buffer[self._filled : self._filled + count] = view[:count]
            self._filled += count
            view = view[count:]
            if self._filled == BUFFER_BYTES:
                self._drain(BUFFER_BYTES)

    def flush(self) -> None:
        """Put everything taken so far into the file, so that it can be read; nothing may be appended afterwards.

        Raises:
            OSError: the disk is full or failed.
        """
        size = self.size
        if self._filled:
            # The last block is written whole and cut to size.
            self._drain(-(-self._filled // ALIGNMENT) * ALIGNMENT)
        self._await()
        if self._written != size:
            os.ftruncate(self._descriptor, size)
            self._written = size

    def finish(self) -> None:
        """:meth:`flush`, wait until it is on disk, and close.

        Raises:
            OSError: the disk is full or failed.
        """
        self.flush()
        os.fsync(self._descriptor)
        self.close()

    def close(self) -> None:
        """Close the file as it is."""
        if not self._closed:
            self._closed = True
            self._disk.shutdown(wait=True)
            os.close(self._descriptor)

    def _drain(self, count: int) -> None:
        """Begin to write the buffer's first bytes, and go on with the other one."""
        self._await()
        self._draining = self._disk.submit(self._write_all, self._buffer, count)
        self._buffer, self._spare = self._spare, self._buffer
        self._written += count
        self._filled = 0

    def _await(self) -> None:
        """Wait until nothing is being written; its error is raised here."""
        if self._draining is not None:
            draining, self._draining = self._draining, None
            draining.result()

    def _write_all(self, buffer: mmap.mmap, count: int) -> None:
        with memoryview(buffer) as view:
            start = 0
            while start < count:
                start += self._write_some(view[start:count])

    def _write_some(self, view: memoryview) -> int:
        try:
            return os.write(self._descriptor, view)
        except OSError as error:
            if error.errno not in _UNSUPPORTED or not _is_direct(self._descriptor):
                raise
            _make_buffered(self._descriptor)
            return os.write(self._descriptor, view)


def read_blocks(path: Path) -> Iterator[memoryview]:
    """A file's bytes from the disk in blocks; each is valid until the next one is asked for.

    Raises:
        OSError: the file cannot be read.
    """
    descriptor = _open(path, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="read") as disk:
            buffer, spare = _buffers()
            reading = disk.submit(_read_some, descriptor, buffer)
            while count := reading.result():
                reading = disk.submit(_read_some, descriptor, spare)
                yield memoryview(buffer)[:count]
                buffer, spare = spare, buffer
    finally:
        os.close(descriptor)


def _read_some(descriptor: int, buffer: mmap.mmap) -> int:
    try:
        count = os.readv(descriptor, [buffer])
    except OSError as error:
        if error.errno not in _UNSUPPORTED or not _is_direct(descriptor):
            raise
        _make_buffered(descriptor)
        count = os.readv(descriptor, [buffer])
    if count % ALIGNMENT:
        # The end of the file, or a short read after which offsets are no longer aligned.
        _make_buffered(descriptor)
    return count


def _buffers() -> tuple[mmap.mmap, mmap.mmap]:
    """Two; anonymous maps are aligned to pages."""
    return mmap.mmap(-1, BUFFER_BYTES), mmap.mmap(-1, BUFFER_BYTES)


def _open(path: Path, flags: int) -> int:
    direct = getattr(os, "O_DIRECT", 0)
    try:
        return os.open(path, flags | direct, 0o666)
    except OSError as error:
        if direct and error.errno in _UNSUPPORTED:
            return os.open(path, flags, 0o666)
        raise


def _is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))


def _make_buffered(descriptor: int) -> None:
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))
