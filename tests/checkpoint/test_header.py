"""The header reader against the safetensors library, and against every file that somebody might have broken."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qconv.checkpoint import header
from qconv.checkpoint.header import DTYPES, MAX_HEADER_BYTES, TensorSpec, encode_header, read_header
from qconv.errors import CheckpointError

Entry = dict[str, Any]


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> Entry:
    """A header entry; by default two float32 at the start."""
    as_list = {"shape": list(shape) if isinstance(shape, tuple) else shape}
    return {"dtype": dtype, **as_list, "data_offsets": list(offsets) if isinstance(offsets, tuple) else offsets}


def file_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file; ``header`` is JSON text, or what becomes it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    """Puts bytes in a file."""

    def put(content: bytes) -> Path:
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        return path

    return put


def deserialize(content: bytes) -> list[tuple[str, dict[str, Any]]]:
    """What the library finds in a file."""
    found: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    return found


WRITTEN = DTYPES.keys() & safetensors.torch._TYPES.keys()
"""What the library's functions for torch know; it reads more."""
SPECS = st.lists(
    st.tuples(
        st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
        st.sampled_from(sorted(WRITTEN)),
        st.lists(st.integers(0, 5), max_size=4),  # scalars and empty tensors too
    ),
    max_size=6,
    unique_by=lambda spec: spec[0],
)


@given(SPECS)
def test_what_we_encode_the_library_reads_and_so_do_we(
    tmp_path_factory: pytest.TempPathFactory, described: list[tuple[str, str, list[int]]]
) -> None:
    specs = [TensorSpec(name, DTYPES[dtype], tuple(shape)) for name, dtype, shape in described]
    size = sum(spec.nbytes for spec in specs)
    data = bytes(index % 251 for index in range(size))  # 251 is prime: an offset error shows
    content = encode_header(specs) + data
    assert (len(content) - size) % 8 == 0  # the specification's alignment of the data
    theirs = dict(deserialize(content))
    path = tmp_path_factory.mktemp("header") / "a.safetensors"
    path.write_bytes(content)
    ours = read_header(path)
    assert ours.keys() == theirs.keys() == {spec.name for spec in specs}
    for name, dtype, shape in described:
        found = ours[name]
        assert (found.dtype, list(found.shape), found.numel) == (DTYPES[dtype], shape, math.prod(shape))
        assert theirs[name]["shape"] == shape
        assert theirs[name]["dtype"] == dtype
        assert bytes(theirs[name]["data"]) == content[found.offset : found.offset + found.nbytes]


@given(SPECS)
def test_what_the_library_writes_we_read(
    tmp_path_factory: pytest.TempPathFactory, described: list[tuple[str, str, list[int]]]
) -> None:
    generator = torch.Generator().manual_seed(len(described))
    tensors = {}
    for name, dtype, shape in described:
        raw = torch.randint(0, 2, (*shape, DTYPES[dtype].itemsize), generator=generator, dtype=torch.uint8)
        tensors[name] = raw.view(DTYPES[dtype]).reshape(shape)
    path = tmp_path_factory.mktemp("header") / "a.safetensors"
    safetensors.torch.save_file(tensors, path)
    content = path.read_bytes()
    ours = read_header(path)
    assert ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = ours[name]
        assert (found.name, found.dtype, found.shape, found.file) == (name, tensor.dtype, tuple(tensor.shape), path)
        assert (
            content[found.offset : found.offset + found.nbytes]
            == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        )


def test_every_strict_prefix_of_a_file_is_refused(write: Callable[[bytes], Path]) -> None:
    specs = [TensorSpec("a", torch.float32, (3,)), TensorSpec("b", torch.int8, (5,))]
    content = encode_header(specs) + bytes(17)
    assert len(read_header(write(content))) == 2
    for length in range(len(content)):
        with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated"):
            read_header(write(content[:length]))


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 10**9, 3])
def test_a_header_longer_than_the_file_is_refused(write: Callable[[bytes], Path], length: int) -> None:
    with pytest.raises(CheckpointError, match="truncated"):
        read_header(write(file_bytes(b"{}", length=length)))


def test_a_header_beyond_the_specification_is_not_even_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(MAX_HEADER_BYTES + 100)  # holes: takes no disk
    with pytest.raises(CheckpointError, match="not plausible"):
        read_header(path)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b" ",
        b"{",
        b"[]",
        b"null",
        b"1",
        b'"a"',
        b"{}{}",
        b'{"a":}',
        b'{"a": NaN}',
        b"\xff\xfe",
        '{"a": 1}'.encode("utf-16"),
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",  # more digits than Python converts
    ],
    ids=lambda text: repr(text[:12]),
)
def test_text_that_is_no_json_object_is_refused(write: Callable[[bytes], Path], text: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_header(write(file_bytes(text)))


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"I8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    ],
    ids=["tensor", "field"],
)
def test_duplicate_keys_are_refused(write: Callable[[bytes], Path], text: bytes) -> None:
    with pytest.raises(CheckpointError, match="twice"):
        read_header(write(file_bytes(text, b"\0")))


HUGE = 10**4000  # Python parses it, and cannot print its square
MALFORMED: dict[str, tuple[Entry | Any, str]] = {
    "not an object": (7, "malformed"),
    "missing field": ({"dtype": "F32", "shape": [2]}, "malformed"),
    "extra field": (entry() | {"extra": 1}, "malformed"),
    "unknown dtype": (entry("F12"), "unknown dtype 'F12'"),
    "dtype no string": (entry(["F32"]), "unknown dtype"),
    "dtype in lower case": (entry("f32"), "unknown dtype"),
    "shape no list": (entry(shape=2), "shape 2 is malformed"),
    "shape null": (entry(shape=None), "shape None is malformed"),
    "shape an object": (entry(shape={"0": 2}), "malformed"),
    "negative shape": (entry(shape=[-2]), "malformed"),
    "two negatives": (entry(shape=[-1, -2]), "malformed"),  # their product is right
    "float shape": (entry(shape=[2.0]), "malformed"),
    "boolean shape": (entry(shape=[2, True]), "malformed"),
    "string in shape": (entry(shape=["2"]), "malformed"),
    "huge shape": (entry(shape=[HUGE, HUGE]), "malformed"),
    "huge empty shape": (entry(shape=[0, HUGE], offsets=[0, 0]), "malformed"),
    "huge product": (entry(shape=[2**62] * 300), "the header lies"),
    "offsets no list": (entry(offsets="08"), "malformed"),
    "one offset": (entry(offsets=[8]), "malformed"),
    "three offsets": (entry(offsets=[0, 4, 8]), "malformed"),
    "negative offset": (entry(offsets=[-8, 0]), "malformed"),
    "float offset": (entry(offsets=[0, 8.0]), "malformed"),
    "reversed offsets": (entry(offsets=[8, 0]), "the header lies"),
    "shape too large": (entry(shape=[3]), "the header lies"),
    "shape too small": (entry(shape=[1]), "the header lies"),
    "scalar": (entry(shape=[]), "the header lies"),
    "wider dtype": (entry("F64"), "the header lies"),
    "narrower dtype": (entry("BF16"), "the header lies"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_entry_is_refused_by_name(write: Callable[[bytes], Path], case: str) -> None:
    fields, message = MALFORMED[case]
    path = write(file_bytes({"the.tensor": fields}, bytes(8)))
    with pytest.raises(CheckpointError, match=r"'the\.tensor'") as caught:
        read_header(path)
    assert message in caught.value.message
    assert str(path) in caught.value.message
    assert caught.value.exit_code == 5


LAYOUTS: dict[str, tuple[tuple[int, int], tuple[int, int], int, str]] = {
    # offsets of a, offsets of b, bytes of data, what the message says
    "gap at the start": ((4, 8), (8, 12), 12, "'a' leaves a gap"),
    "gap between": ((0, 4), (6, 10), 10, "'b' leaves a gap"),
    "partial overlap": ((0, 4), (2, 6), 6, "'b' overlaps"),
    "same place": ((0, 4), (0, 4), 4, "overlaps"),
    "beyond the file": ((0, 4), (4, 8), 7, "truncated"),
    "trailing bytes": ((0, 4), (4, 8), 9, "1 bytes more"),
    "far beyond the file": ((0, 4), (2**62, 2**62 + 4), 8, "'b' leaves a gap"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_tensors_must_tile_the_data(write: Callable[[bytes], Path], case: str) -> None:
    a, b, size, message = LAYOUTS[case]
    header = {"a": entry("I8", (4,), a), "b": entry("I8", (4,), b)}
    with pytest.raises(CheckpointError, match=message):
        read_header(write(file_bytes(header, bytes(size))))


def test_an_empty_tensor_must_not_lie_inside_another(write: Callable[[bytes], Path]) -> None:
    header = {"a": entry("I8", (4,), (0, 4)), "empty": entry("I8", (0,), (2, 2))}
    with pytest.raises(CheckpointError, match="'empty' overlaps"):
        read_header(write(file_bytes(header, bytes(4))))


def test_order_in_the_header_need_not_be_the_order_in_the_file(write: Callable[[bytes], Path]) -> None:
    header = {"b": entry("I8", (4,), (4, 8)), "a": entry("I8", (4,), (0, 4))}
    assert list(read_header(write(file_bytes(header, bytes(8))))) == ["a", "b"]


def test_a_missing_file_and_a_folder_are_checkpoint_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match="cannot read"):
            read_header(path)


TWO = [TensorSpec("model.a.weight", torch.bfloat16, (2, 3)), TensorSpec("model.b.bias", torch.float32, (4,))]
GOOD = encode_header(TWO) + bytes(range(28))
HEADER_BYTES = len(GOOD) - 28


@settings(max_examples=500)  # about one in ten still parses
@given(
    st.lists(st.tuples(st.integers(0, HEADER_BYTES - 1), st.integers(0, 255)), min_size=1, max_size=3),
)
def test_a_corrupt_header_gives_an_error_or_what_the_library_gives(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    content = bytearray(GOOD)
    for position, value in changes:
        content[position] = value
    path = tmp_path_factory.getbasetemp() / "corrupt.safetensors"
    path.write_bytes(content)
    try:
        ours = read_header(path)
    except CheckpointError:
        return
    theirs = dict(deserialize(bytes(content)))  # raises where we accept what the library refuses
    assert ours.keys() == theirs.keys()
    for name, found in ours.items():
        assert list(found.shape) == theirs[name]["shape"]
        assert DTYPES[theirs[name]["dtype"]] == found.dtype
        assert bytes(theirs[name]["data"]) == content[found.offset : found.offset + found.nbytes]


OF_THREE = {"U16": 6, "U32": 12, "U64": 24, "C64": 24, "F8_E8M0": 3, "F8_E4M3FNUZ": 3, "F8_E5M2FNUZ": 3}
"""Bytes of three elements."""
SHARING = {"F4": ((3, 2), 3), "F6_E2M3": ((4,), 3), "F6_E3M2": ((4,), 3)}
"""Elements of 4 and 6 bits share bytes: a shape, and the bytes that it fills."""


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [
        *((dtype, (3,), nbytes) for dtype, nbytes in OF_THREE.items()),
        *((name, *rest) for name, rest in SHARING.items()),
    ],
)
def test_every_dtype_of_the_format_is_known(
    write: Callable[[bytes], Path], dtype: str, shape: tuple[int, ...], nbytes: int
) -> None:
    content = file_bytes({"a": entry(dtype, shape, (0, nbytes))}, bytes(nbytes))
    found = read_header(write(content))["a"]
    assert (found.dtype_name, found.shape, found.nbytes) == (dtype, shape, nbytes)
    if dtype.startswith(("U", "C")):  # the library's functions for NumPy have no floats of 8 bits and less
        assert deserialize(content)[0][1]["dtype"] == dtype


def test_elements_that_do_not_fill_the_last_byte_are_refused(write: Callable[[bytes], Path]) -> None:
    with pytest.raises(CheckpointError, match="the header lies"):
        read_header(write(file_bytes({"a": entry("F4", (3,), (0, 1))}, bytes(1))))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 1641920\n"


@pytest.mark.parametrize(
    ("content", "what", "remedy"),
    [
        (LFS, "a git-lfs pointer", "git lfs pull"),
        (b"/annex/objects/SHA256E-s10--ab\n", "a git-annex pointer", "git annex get"),
        (b"<!DOCTYPE html><html><body>401 Unauthorized</body></html>", "an HTML or XML page", "logged in"),
        (b"\n  <?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an HTML or XML page", "logged in"),
        (b"Entry not found", "a server's error message", "access token"),
        (b"PK\x03\x04" + bytes(40), "a pickled PyTorch file", "does not unpickle"),
        (b"\x80\x02}q\x00" + bytes(40), "a pickled PyTorch file", "does not unpickle"),
        (b"\x1f\x8b\x08" + bytes(range(40)), "compressed with gzip", "Decompress"),
        (b"GGUF\x03\x00\x00\x00" + bytes(range(1, 40)), "a GGUF file", "path by itself"),
    ],
)
def test_what_lies_in_a_files_stead_is_named(
    write: Callable[[bytes], Path], content: bytes, what: str, remedy: str
) -> None:
    with pytest.raises(CheckpointError, match="not a safetensors file") as caught:
        read_header(write(content))
    assert what in caught.value.message
    assert remedy in str(caught.value.hint)


def test_other_content_is_not_called_truncated(write: Callable[[bytes], Path]) -> None:
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_header(write(b"just some text that somebody saved"))


FEW = 1000
"""What the tests take for the bound of a header's tensors: the true one takes seconds to write."""


def hostile(form: str) -> bytes:
    """A header that would become far more objects than its tensors need."""
    if form == "tensors":
        one = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
        return b"{" + b",".join(one % number for number in range(FEW + 1)) + b"}"
    inner = {"lists": b"[]", "numbers": b"7" * 9}[form]
    return b'{"a":[' + b",".join([inner] * (20 * FEW)) + b"]}"


@pytest.mark.parametrize("form", ["tensors", "lists", "numbers"])
def test_more_than_a_header_can_hold_is_not_built(
    write: Callable[[bytes], Path], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(header, "MAX_TENSORS", FEW)
    monkeypatch.setattr(header, "_MAX_COMMAS", 16 * FEW)
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("was parsed"))
    with pytest.raises(CheckpointError, match="not plausible"):
        read_header(write(file_bytes(hostile(form))))


@pytest.mark.parametrize(
    "fields",
    [
        entry(shape=[7] * 50_000),
        entry(shape="x" * 50_000),
        entry("D" * 50_000),
        entry(offsets=list(range(9000))),
        entry(shape=[[[[1] * 100] * 10] * 10]),
    ],
    ids=["dimensions", "shape", "dtype", "offsets", "nested"],
)
def test_messages_do_not_quote_megabytes(write: Callable[[bytes], Path], fields: Entry) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_header(write(file_bytes({"n" * 50_000: fields}, bytes(8))))
    assert len(str(caught.value)) < 1000


def test_half_of_a_surrogate_pair_is_no_name(write: Callable[[bytes], Path]) -> None:
    text = b'{"\\ud800":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}'
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_header(write(file_bytes(text, b"\0")))


def test_a_device_is_not_read() -> None:
    with pytest.raises(CheckpointError, match="it is no file"):
        read_header(Path("/dev/zero"))
