"""The header reader against the ``gguf`` package, and against every file that somebody might have broken."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qconv.errors import CheckpointError
from qconv.formats.gguf import header
from qconv.formats.gguf.header import read_header
from tests.formats.gguf.conftest import Write, gguf_bytes, key, tensor, text

F32, Q8_0 = 0, 8
UINT8, UINT32, FLOAT32, STRING, ARRAY, UINT64 = 0, 4, 6, 8, 9, 10
HUGE = 2**63 - 8

BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "safetensors": (struct.pack("<Q", 2) + b"{}" + bytes(64), "not a GGUF file"),
    "version 1": (gguf_bytes(version=1), "GGUF version 1"),
    "big endian": (gguf_bytes(version=3 << 24), "GGUF version 50331648"),
    "more keys than bytes": (gguf_bytes(key_count=2**40), "key count says"),
    "more tensors than bytes": (gguf_bytes(tensor_count=2**62), "tensor count says"),
    "a key that is not there": (gguf_bytes(key_count=1), "truncated"),
    "a long key": (gguf_bytes([text("k") + struct.pack("<I", STRING) + struct.pack("<Q", HUGE)]), "truncated"),
    "a key twice": (gguf_bytes([key("k", UINT32, bytes(4))] * 2), "key 'k' is there twice"),
    "a key of bytes": (gguf_bytes([key(b"\xff\xfe", UINT32, bytes(4))]), "is not UTF-8"),
    "an unknown value type": (gguf_bytes([key("k", 99, bytes(8))]), "unknown type 99"),
    "an array of unknown type": (gguf_bytes([key("k", ARRAY, struct.pack("<IQ", 99, 0))]), "unknown type 99"),
    "a nested array": (gguf_bytes([key("k", ARRAY, struct.pack("<IQ", ARRAY, 1))]), "array of arrays"),
    "a huge array": (gguf_bytes([key("k", ARRAY, struct.pack("<IQ", UINT64, 2**61))]), "key 'k' says"),
    "huge texts": (gguf_bytes([key("k", ARRAY, struct.pack("<IQ", STRING, 2**61))]), "key 'k' says"),
    "alignment 0": (gguf_bytes([key("general.alignment", UINT32, bytes(4))]), "not a power of two"),
    "alignment 24": (gguf_bytes([key("general.alignment", UINT32, struct.pack("<I", 24))]), "not a power of two"),
    "alignment of text": (gguf_bytes([key("general.alignment", STRING, text("32"))]), "not a power of two"),
    "a tensor without name": (gguf_bytes((), [tensor("")], bytes(32)), "does not have 1 to 63 bytes"),
    "a tensor with a long name": (gguf_bytes((), [tensor("n" * 64)], bytes(32)), "does not have 1 to 63 bytes"),
    "a tensor twice": (gguf_bytes((), [tensor(), tensor(offset=32)], bytes(64)), "tensor 't' is there twice"),
    "no dimensions": (gguf_bytes((), [tensor(shape=())], bytes(32)), "has 0 dimensions"),
    "many dimensions": (gguf_bytes((), [tensor(shape=(1,) * 5)], bytes(32)), "has 5 dimensions"),
    "2^32 dimensions": (gguf_bytes((), [text("t") + b"\xff" * 4 + bytes(64)]), "has 4294967295 dimensions"),
    "an empty dimension": (gguf_bytes((), [tensor(shape=(8, 0))]), "not plausible"),
    "a shape that overflows": (gguf_bytes((), [tensor(shape=(2**40, 2**40))]), "not plausible"),
    "a negative length": (gguf_bytes((), [tensor(shape=(2**64 - 8,))]), "not plausible"),
    "an unknown type": (gguf_bytes((), [tensor(type=77)], bytes(32)), "of unknown type 77"),
    "a removed type": (gguf_bytes((), [tensor(type=4)], bytes(32)), "of unknown type 4"),
    "a row of half a block": (gguf_bytes((), [tensor(shape=(48,), type=Q8_0)], bytes(64)), "no whole blocks of Q8_0"),
    "no data": (gguf_bytes((), [tensor()]), "end within tensor 't'"),
    "half the data": (gguf_bytes((), [tensor(shape=(64,))], bytes(128)), "end within tensor 't'"),
    "an offset beyond the file": (gguf_bytes((), [tensor(offset=HUGE)], bytes(32)), "leaves a gap"),
    "an offset that wraps": (gguf_bytes((), [tensor(offset=2**64 - 32)], bytes(32)), "leaves a gap"),
    "a gap": (gguf_bytes((), [tensor("a"), tensor("b", offset=64)], bytes(96)), "tensor 'b' leaves a gap"),
    "an overlap": (gguf_bytes((), [tensor("a"), tensor("b", offset=0)], bytes(64)), "tensor 'b' overlaps"),
    "leftover bytes": (gguf_bytes((), [tensor()], bytes(64)), "32 bytes more than its header says"),
    "leftover bytes without tensors": (gguf_bytes((), (), bytes(32)), "32 bytes more"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    content, what = BROKEN[name]
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=what) as caught:
        read_header(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


@pytest.fixture(scope="module")
def sound() -> bytes:
    """A file with every kind of value."""
    keys = [
        key("a", UINT32, struct.pack("<I", 7)),
        key("b", STRING, text("text")),
        key("c", ARRAY, struct.pack("<IQ", STRING, 2) + text("x") + text(b"\xc3")),
        key("d", ARRAY, struct.pack("<IQ3f", FLOAT32, 3, 1.0, 2.0, 3.0)),
    ]
    tensors = [tensor("t", (64, 2), Q8_0), tensor("u", (3,), F32, 160)]
    return gguf_bytes(keys, tensors, bytes(160 + 32))


def test_a_sound_file_is_read(sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "sound.gguf"
    path.write_bytes(sound)
    found = read_header(path)
    assert found.metadata["a"] == 7
    assert found.metadata["b"] == "text"
    assert found.metadata["c"] == ["x", "\udcc3"]  # half a character, kept apart from other halves
    np.testing.assert_array_equal(np.asarray(found.metadata["d"]), np.array([1.0, 2.0, 3.0], dtype=np.float32))
    entries = [(entry.name, entry.type.name, entry.shape, entry.nbytes) for entry in found.entries.values()]
    assert entries == [("t", "Q8_0", (2, 64), 136), ("u", "F32", (3,), 12)]
    start = len(sound) - 192
    assert [entry.offset for entry in found.entries.values()] == [start, start + 160]


def test_the_last_tensors_padding_may_be_missing(sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "sound.gguf"
    path.write_bytes(sound[:-20])
    assert len(read_header(path).entries) == 2


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 400), position=st.integers(0, 400), byte=st.integers(0, 255))
def test_any_damage_is_an_error_or_harmless(sound: bytes, tmp_path: Path, cut: int, position: int, byte: int) -> None:
    content = bytearray(sound[: len(sound) - cut])
    if position < len(content):
        content[position] = byte
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):  # any other exception is a failure
        for entry in read_header(path).entries.values():
            assert entry.offset + entry.nbytes <= len(content)


def test_an_absurdly_long_header_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "MAX_HEADER_BYTES", 1000)
    path = tmp_path / "long.gguf"
    path.write_bytes(gguf_bytes([key("k", STRING, text("x" * 2000))]))
    with pytest.raises(CheckpointError, match="a header of more than 1000 bytes"):
        read_header(path)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "shrinking.gguf"
    path.write_bytes(sound[:60])
    with path.open("rb") as file, pytest.raises(CheckpointError, match="truncated while it was read"):
        header._Parser(path, file, len(sound)).header()


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read: No such file"):
        read_header(tmp_path / "missing.gguf")


def test_our_files_read_as_the_gguf_package_reads_them(write_gguf: Write) -> None:
    _, (path,) = write_gguf("Q8_0")
    ours, theirs = read_header(path), GGUFReader(path)
    assert [entry.name for entry in ours.entries.values()] == [one.name for one in theirs.tensors]
    for entry, one in zip(ours.entries.values(), theirs.tensors, strict=True):
        assert (entry.type, entry.shape) == (one.tensor_type, tuple(one.shape[::-1].tolist()))
        assert (entry.offset, entry.nbytes) == (one.data_offset, one.n_bytes)
    for name, value in ours.metadata.items():
        expected = theirs.fields[name].contents()
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == expected, name


def test_a_key_of_another_kind_is_no_number(tmp_path: Path) -> None:
    path = tmp_path / "kinds.gguf"
    path.write_bytes(gguf_bytes([key("n", UINT32, struct.pack("<I", 3)), key("s", STRING, text("3"))]))
    found = read_header(path)
    assert found.integer("n") == 3
    assert found.integer("absent") is None
    with pytest.raises(CheckpointError, match="s is '3', not a whole number"):
        found.integer("s")
