"""The header of a GGUF file, read with suspicion.

Such files come from anywhere. Every length is checked against what is left of the file before it is believed, and what
llama.cpp would refuse or crash on is refused here by file and tensor. The ``gguf`` package's own reader believes
lengths and offsets.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType, Keys
from numpy.typing import NDArray

from qconv.boundary.content import head_of, instead_of_file
from qconv.errors import CheckpointError
from qconv.formats.gguf.container import MAX_NAME_BYTES

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 2**28
"""Real headers, of 250,000 tokens with their merges, take some 15 MB."""
MAX_DIMENSIONS = 4

Value: TypeAlias = int | float | bool | str | list[str] | NDArray[Any]
"""A key's value; arrays of numbers are NumPy arrays."""

_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
    GGUFValueType.BOOL: "<?",
}
_LIMIT = 2**63
_REDOWNLOAD = "Download or copy the file again."


@dataclass(frozen=True, slots=True)
class GgufEntry:
    """Where a tensor lies: ``shape`` is outermost first, ``offset`` counts bytes from the start of ``file``."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What one file says: its key/values and its tensors, in file order."""

    path: Path
    metadata: dict[str, Value]
    entries: dict[str, GgufEntry]

    def integer(self, key: str) -> int | None:
        """A key's whole number; None if absent.

        Raises:
            CheckpointError: it is something else.
        """
        value = self.metadata.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise CheckpointError(f"{self.path}: {key} is {value!r}, not a whole number.", hint=_REDOWNLOAD)
        return value


def read_header(path: Path) -> GgufHeader:
    """Key/values and tensors of a GGUF file.

    Raises:
        CheckpointError: unreadable, not GGUF, truncated, or a header that contradicts itself or the file's size.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _Parser(path, file, size).header()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror}.", hint="Check the file and the disk.") from error


class _Parser:
    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path = path
        self.file = file
        self.size = size
        self.position = 0

    def header(self) -> GgufHeader:
        # 1. What kind of file, and how much of it.
        instead = instead_of_file(head_of(self.path))
        if instead is not None:
            raise CheckpointError(f"{self.path}: not a GGUF file: it is {instead.what}.", hint=instead.remedy)
        if self._bytes(4, "magic") != MAGIC:
            raise self._error("not a GGUF file")
        version = self._number("<I", "version")
        if version not in VERSIONS:
            raise self._error(f"GGUF version {version}; versions {VERSIONS[0]} and {VERSIONS[1]} are read")
        tensors = self._count("tensor count", least_bytes=24)
        keys = self._count("key count", least_bytes=13)
        # 2. Key/values.
        metadata: dict[str, Value] = {}
        for _ in range(keys):
            key = self._text("a key", strict=True)
            if key in metadata:
                raise self._error(f"key {key!r} is there twice")
            metadata[key] = self._value(key)
        alignment = self._alignment(metadata)
        # 3. Tensors, whose offsets count from the end of the header.
        infos = [self._tensor() for _ in range(tensors)]
        start = self.position + -self.position % alignment
        entries: dict[str, GgufEntry] = {}
        expected = start
        for name, type, shape, offset in infos:
            entry = self._entry(name, type, shape, start + offset)
            if name in entries:
                raise self._error(f"tensor {name!r} is there twice")
            if entry.offset != expected:
                fault = "overlaps the one before it" if entry.offset < expected else "leaves a gap before it"
                raise self._error(f"the header lies: tensor {name!r} {fault}")
            entries[name] = entry
            expected += entry.nbytes + -entry.nbytes % alignment
            if self.size < entry.offset + entry.nbytes:
                raise self._error(f"truncated: {self.size} bytes end within tensor {name!r}")
        if self.size > expected:
            raise self._error(f"{self.size - expected} bytes more than its header says ({expected})")
        return GgufHeader(self.path, metadata, entries)

    def _entry(self, name: str, type: int, shape: tuple[int, ...], offset: int) -> GgufEntry:
        try:
            known = GGMLQuantizationType(type)
            elements, block_bytes = GGML_QUANT_SIZES[known]
        except (ValueError, KeyError):
            raise self._error(f"tensor {name!r} is of unknown type {type}") from None
        numel = 1
        for length in shape:
            numel *= length
            if not 0 < length < _LIMIT or numel * block_bytes >= _LIMIT:
                raise self._error(f"tensor {name!r}: shape {list(shape)} is not plausible")
        if shape[-1] % elements:
            raise self._error(f"tensor {name!r}: rows of {shape[-1]} are no whole blocks of {known.name}")
        return GgufEntry(name, known, shape, self.path, offset, numel // elements * block_bytes)

    def _tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._text("a tensor's name", strict=True)
        if not 0 < len(name.encode()) <= MAX_NAME_BYTES:
            raise self._error(f"tensor name {name[:80]!r} does not have 1 to {MAX_NAME_BYTES} bytes")
        dimensions = self._number("<I", f"tensor {name!r}")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._error(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self._number("<Q", f"tensor {name!r}") for _ in range(dimensions))
        type = self._number("<I", f"tensor {name!r}")
        offset = self._number("<Q", f"tensor {name!r}")
        return name, type, shape[::-1], offset

    def _alignment(self, metadata: dict[str, Value]) -> int:
        alignment = metadata.get(Keys.General.ALIGNMENT, GGUF_DEFAULT_ALIGNMENT)
        if (
            isinstance(alignment, bool)
            or not isinstance(alignment, int)
            or alignment not in (1 << n for n in range(21))
        ):
            raise self._error(f"{Keys.General.ALIGNMENT} is {alignment!r}, not a power of two")
        return alignment

    def _value(self, key: str) -> Value:
        kind = self._type(key)
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind], f"key {key!r}")
        if kind == GGUFValueType.STRING:
            return self._text(f"key {key!r}")
        item = self._type(key)
        if item == GGUFValueType.ARRAY:
            raise self._error(f"key {key!r} is an array of arrays")
        if item == GGUFValueType.STRING:
            count = self._count(f"key {key!r}", least_bytes=8)
            return [self._text(f"key {key!r}") for _ in range(count)]
        dtype = np.dtype(_SCALARS[item])
        count = self._count(f"key {key!r}", least_bytes=dtype.itemsize)
        return np.frombuffer(self._bytes(count * dtype.itemsize, f"key {key!r}"), dtype=dtype)

    def _type(self, key: str) -> GGUFValueType:
        number = self._number("<I", f"key {key!r}")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self._error(f"key {key!r} is of unknown type {number}") from None

    def _text(self, what: str, *, strict: bool = False) -> str:
        length = self._number("<Q", what)
        data = self._bytes(length, what)
        try:
            # Vocabularies may hold pieces of characters; they must stay distinct.
            return data.decode(errors="strict" if strict else "surrogateescape")
        except UnicodeDecodeError:
            raise self._error(f"{what} is not UTF-8") from None

    def _count(self, what: str, least_bytes: int) -> int:
        """A number of things that take at least so many bytes each, so that no absurd number is believed."""
        count = self._number("<Q", what)
        if count * least_bytes > self.size - self.position:
            raise self._error(f"truncated or damaged: {what} says {count}")
        return count

    def _number(self, code: str, what: str) -> int:
        return int(self._scalar(code, what))

    def _scalar(self, code: str, what: str) -> int | float | bool:
        unpack: Callable[..., tuple[Any, ...]] = struct.unpack
        value: int | float | bool = unpack(code, self._bytes(struct.calcsize(code), what))[0]
        return value

    def _bytes(self, count: int, what: str) -> bytes:
        if count > self.size - self.position:
            raise self._error(f"truncated: {self.size} bytes end within {what}")
        if self.position + count > MAX_HEADER_BYTES:
            raise self._error(f"a header of more than {MAX_HEADER_BYTES} bytes is not plausible")
        data = self.file.read(count)
        if len(data) != count:
            raise self._error(f"truncated while it was read, within {what}")
        self.position += count
        return data

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}.", hint=_REDOWNLOAD)
