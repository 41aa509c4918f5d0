"""The safetensors header, read with suspicion.

A file is: 8 bytes little-endian header length, a JSON object, then the tensors' bytes back to back. The checks are
those of the format's own specification: every tensor inside the file, no overlap, no gap, no leftover, sizes that agree
with dtype and shape.
"""

from __future__ import annotations

import json
import math
import reprlib
import stat
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qconv.boundary.content import HEAD_BYTES, instead_of_tensors
from qconv.boundary.printable import name_of, printable
from qconv.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The specification's own bound on the JSON's length."""
MAX_TENSORS = 500_000
"""Of one file. A model of a trillion weights in 384 experts a layer, each packed with its scales, has 350,000."""
_MAX_COMMAS = 16 * MAX_TENSORS
_MAX_DIMENSIONS = 1000
"""torch has no tensor of more than 64; the format sets no bound."""

DTYPES: dict[str, torch.dtype] = {
    "C64": torch.complex64,
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PACKED_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Bits of an element of the dtypes whose elements share bytes. Shapes count elements."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_LIMIT = 2**63
"""No size or offset reaches it; larger numbers are not printable or do not fit a tensor's shape."""

_REDOWNLOAD = "Download or copy the file again."
_FIELDS = {"dtype", "shape", "data_offsets"}

_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxdict = 8
_SHORT.maxlevel = 2


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor in a file is called, its dtype and its shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: ``offset`` counts bytes from the start of ``file``.

    Attributes:
        packed: The name of a dtype of :data:`PACKED_BITS`, of which ``dtype`` has the bytes; else empty.
        strides: Of a view whose elements do not lie back to back, how many elements of the file apart they lie along
            each axis; else empty. ``nbytes`` counts the view's own elements.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    packed: str = ""
    strides: tuple[int, ...] = ()

    @property
    def dtype_name(self) -> str:
        """The dtype as safetensors spells it."""
        return self.packed or DTYPE_NAMES[self.dtype]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def steps(self) -> tuple[int, ...]:
        """How many elements of the file apart elements lie along each axis."""
        return self.strides or _back_to_back(self.shape)

    @property
    def span(self) -> int:
        """How many bytes of the file it lies in, from ``offset`` on."""
        if not self.nbytes or not self.strides:
            return self.nbytes
        last = sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True))
        return (last + 1) * self.dtype.itemsize

    def tensor(self, raw: Tensor) -> Tensor:
        """What the bytes of the file that it lies in hold, uint8 [span]; a copy where its elements lie apart."""
        if self.offset % self.dtype.itemsize:
            raw = raw.clone()
        values = raw.view(self.dtype)
        if self.strides:
            return values.as_strided(self.shape, self.strides).clone(memory_format=torch.contiguous_format)
        return values.view(self.shape)

    def view(self, name: str, start: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> TensorEntry:
        """Some of its elements under another name, from the ``start``-th of the file's on."""
        return replace(
            self,
            name=name,
            shape=shape,
            offset=self.offset + start * self.dtype.itemsize,
            nbytes=math.prod(shape) * self.dtype.itemsize,
            strides=() if strides == _back_to_back(shape) else strides,
        )


def _back_to_back(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of elements without gaps, the last axis fastest."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def encode_header(specs: Sequence[TensorSpec], framework: str = "pt") -> bytes:
    """Length prefix and JSON for tensors laid out back to back in the order of ``specs``, padded to 8 bytes.

    ``framework`` is whose tensors readers take them for.
    """
    table: dict[str, Any] = {"__metadata__": {"format": framework}}
    offset = 0
    for spec in specs:
        end = offset + spec.nbytes
        table[spec.name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Entries of a safetensors file by tensor name, in file order.

    Raises:
        CheckpointError: unreadable, truncated, oversized, or a header that contradicts itself or the file's size.
    """
    text, size = _header_text(path)
    table = _parse_json(path, text)
    start = 8 + len(text)
    entries = [_entry(path, name, fields, start) for name, fields in table.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    _check_layout(path, entries, start, size)
    return {entry.name: entry for entry in entries}


def _header_text(path: Path) -> tuple[bytes, int]:
    """The JSON of a file's header, and the file's size."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path}: cannot read: it is no file.", hint=_REDOWNLOAD)
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
            length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else 0
            if len(head) < 8 or length > found.st_size - 8:
                raise _no_header(path, head, found.st_size)
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: header of {length} bytes is not plausible.", hint=_REDOWNLOAD)
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror}.", hint="Check the file and the disk.") from error
    if len(text) != length:
        raise CheckpointError(f"{path}: truncated while it was read.", hint=_REDOWNLOAD)
    if text.count(b"{") > MAX_TENSORS or text.count(b"[") > 2 * MAX_TENSORS or text.count(b",") > _MAX_COMMAS:
        raise CheckpointError(
            f"{path}: header of {length} bytes for more than {MAX_TENSORS:,} tensors is not plausible.",
            hint=_REDOWNLOAD,
        )
    return text, found.st_size


def _no_header(path: Path, head: bytes, size: int) -> CheckpointError:
    """What is wrong with a file of which the first bytes are no header's length, or that of a longer file."""
    instead = instead_of_tensors(head)
    if instead is not None:
        return CheckpointError(f"{path}: not a safetensors file: it is {instead.what}.", hint=instead.remedy)
    if head[8:9] not in (b"", b"{"):
        return CheckpointError(f"{path}: not a safetensors file, nor another that qconv knows.", hint=_REDOWNLOAD)
    return CheckpointError(f"{path}: truncated: {size} bytes cannot hold its header.", hint=_REDOWNLOAD)


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"key {name_of(twice)!r} twice")
        return table

    try:
        table = json.loads(text.decode(), object_pairs_hook=no_duplicates)
        if b"\\u" in text:
            "".join(table).encode()  # half of a surrogate pair has no UTF-8, and is no name
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: header is not valid JSON: {name_of(str(error))}.", hint=_REDOWNLOAD) from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: header is not a JSON object.", hint=_REDOWNLOAD)
    return table


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LIMIT


def _nbytes(shape: Sequence[int], bits: int) -> int | None:
    """Bytes of a tensor, or None if no file can be that large or the last byte is not full."""
    total = bits
    for size in shape:
        total *= size
        if total >= 8 * _LIMIT:
            return None
    return None if total % 8 else total // 8


def _shown(value: Any) -> str:
    """A value from the header, cut where it is long."""
    return printable(_SHORT.repr(value))


def _entry(path: Path, name: str, fields: Any, data_start: int) -> TensorEntry:
    def malformed(what: str, hint: str = _REDOWNLOAD) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name_of(name)!r}: {what}.", hint=hint)

    if not isinstance(fields, dict) or fields.keys() != _FIELDS:
        raise malformed("header entry is malformed")
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    packed = code if isinstance(code, str) and code in PACKED_BITS else ""
    dtype = torch.uint8 if packed else DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise malformed(f"unknown dtype {_shown(code)}", "qconv cannot read this tensor.")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(map(_natural, shape)):
        raise malformed(f"shape {_shown(shape)} is malformed")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)):
        raise malformed(f"data_offsets {_shown(offsets)} is malformed")
    begin, end = offsets
    nbytes = _nbytes(shape, PACKED_BITS[packed] if packed else 8 * dtype.itemsize)
    if end - begin != nbytes:
        takes = "no number of bytes that a file has" if nbytes is None else f"{nbytes} bytes"
        raise malformed(f"the header lies: {code} {_shown(shape)} takes {takes}, its offsets span {end - begin}")
    return TensorEntry(name, dtype, tuple(shape), path, data_start + begin, end - begin, packed)


def _check_layout(path: Path, entries: Sequence[TensorEntry], data_start: int, size: int) -> None:
    expected = data_start
    for entry in entries:
        if entry.offset != expected:
            fault = "overlaps the one before it" if entry.offset < expected else "leaves a gap before it"
            raise CheckpointError(f"{path}: the header lies: tensor {name_of(entry.name)!r} {fault}.", hint=_REDOWNLOAD)
        expected = entry.offset + entry.nbytes
    if size < expected:
        raise CheckpointError(f"{path}: truncated: {size} bytes, its header says {expected}.", hint=_REDOWNLOAD)
    if size > expected:
        raise CheckpointError(
            f"{path}: {size - expected} bytes more than its header says ({expected}).", hint=_REDOWNLOAD
        )
