"""Direct files: the same bytes whatever the sizes, and on file systems that refuse direct access."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qconv.checkpoint import direct
from qconv.checkpoint.direct import ALIGNMENT, BUFFER_BYTES, DirectWriter, read_blocks

# Around a block, around the buffer, and across several of either.
SIZES = [0, 1, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1, BUFFER_BYTES - 1, BUFFER_BYTES, 2 * BUFFER_BYTES + 5000]


def write(path: Path, *parts: bytes) -> None:
    with DirectWriter(path) as file:
        for part in parts:
            file.write(part)
        file.finish()


def read(path: Path) -> bytes:
    return b"".join(bytes(block) for block in read_blocks(path))


@pytest.mark.parametrize("size", SIZES)
def test_what_is_written_is_read(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    write(tmp_path / "file", data)
    assert (tmp_path / "file").read_bytes() == data
    assert read(tmp_path / "file") == data


@given(parts=st.lists(st.binary(max_size=9000), max_size=8))
def test_parts_of_any_size_follow_each_other(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("parts") / "file"
    write(path, *parts)
    assert path.read_bytes() == b"".join(parts) == read(path)


def test_flushed_bytes_can_be_read_before_the_file_is_finished(tmp_path: Path) -> None:
    with DirectWriter(tmp_path / "file") as file:
        file.write(b"x" * 5000)
        assert file.size == 5000
        file.flush()
        assert (tmp_path / "file").read_bytes() == b"x" * 5000
        file.finish()


def test_a_file_system_that_refuses_direct_access_at_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    write(tmp_path / "file", b"y" * 10_000)
    assert read(tmp_path / "file") == b"y" * 10_000


def test_a_file_system_that_refuses_direct_access_at_the_first_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_write, real_read = os.write, os.readv
    refused = []

    def refuse(descriptor: int) -> None:
        if direct._is_direct(descriptor):
            refused.append(descriptor)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def write_some(descriptor: int, data: memoryview) -> int:
        refuse(descriptor)
        return real_write(descriptor, data)

    def read_some(descriptor: int, buffers: list[bytearray]) -> int:
        refuse(descriptor)
        return real_read(descriptor, buffers)

    monkeypatch.setattr(os, "write", write_some)
    monkeypatch.setattr(os, "readv", read_some)
    write(tmp_path / "file", b"z" * 10_000)
    assert read(tmp_path / "file") == b"z" * 10_000
    assert refused, "the test must have met direct access"


def test_a_block_stays_what_it_was_until_the_next_one_is_asked_for(tmp_path: Path) -> None:
    data = os.urandom(5 * BUFFER_BYTES)
    (tmp_path / "file").write_bytes(data)
    for index, block in enumerate(read_blocks(tmp_path / "file")):
        time.sleep(0.02)  # enough to read the next one
        assert block == data[index * BUFFER_BYTES :][: len(block)]


def test_reading_may_end_early(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(3 * BUFFER_BYTES))
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    blocks = read_blocks(tmp_path / "file")
    next(blocks)
    blocks.close()  # type: ignore[attr-defined]  # an iterator for its callers
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


@pytest.mark.parametrize("place", ["write", "flush"])
def test_a_full_disk_is_told_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with DirectWriter(tmp_path / "file") as file:
        file.write(bytes(BUFFER_BYTES))
        with pytest.raises(OSError, match="No space left"):
            file.write(bytes(BUFFER_BYTES)) if place == "write" else file.flush()
    assert not any(thread.name.startswith("write") for thread in threading.enumerate())


def test_other_errors_are_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "write", broken)
    with pytest.raises(OSError, match="Input/output"):
        write(tmp_path / "file", b"w")
