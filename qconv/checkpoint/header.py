"""The safetensors header, read with suspicion.

A file is: 8 bytes little-endian header length, a JSON object, then the tensors' bytes back to back. The checks are
those of the format's own specification: every tensor inside the file, no overlap, no gap, no leftover, sizes that agree
with dtype and shape.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qconv.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The specification's own bound on the JSON's length."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_LIMIT = 2**63
"""No size or offset reaches it; larger numbers are not printable or do not fit a tensor's shape."""

_REDOWNLOAD = "Download or copy the file again."


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
    """Where a tensor lies: ``offset`` counts bytes from the start of ``file``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


def encode_header(specs: Sequence[TensorSpec]) -> bytes:
    """Length prefix and JSON for tensors laid out back to back in the order of ``specs``, padded to 8 bytes."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
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
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if len(prefix) < 8 or length > size - 8:
                raise CheckpointError(f"{path}: truncated: {size} bytes cannot hold its header.", hint=_REDOWNLOAD)
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: header of {length} bytes is not plausible.", hint=_REDOWNLOAD)
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror}.", hint="Check the file and the disk.") from error
    table = _parse_json(path, text)
    entries = [_entry(path, name, fields, 8 + length) for name, fields in table.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    _check_layout(path, entries, 8 + length, size)
    return {entry.name: entry for entry in entries}


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key in table:
                raise ValueError(f"key {key!r} twice")
            table[key] = value
        return table

    try:
        table = json.loads(text.decode(), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: header is not valid JSON: {error}.", hint=_REDOWNLOAD) from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: header is not a JSON object.", hint=_REDOWNLOAD)
    return table


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LIMIT


def _nbytes(shape: Sequence[int], itemsize: int) -> int | None:
    """Bytes of a tensor, or None if no file can be that large."""
    nbytes = itemsize
    for size in shape:
        nbytes *= size
        if nbytes >= _LIMIT:
            return None
    return nbytes


def _entry(path: Path, name: str, fields: Any, data_start: int) -> TensorEntry:
    where = f"{path}: tensor {name!r}"
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: header entry is malformed.", hint=_REDOWNLOAD)
    dtype = DTYPES.get(fields["dtype"]) if isinstance(fields["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{where}: unknown dtype {fields['dtype']!r}.", hint="qconv cannot read this tensor.")
    shape, offsets = fields["shape"], fields["data_offsets"]
    if not isinstance(shape, list) or not all(map(_natural, shape)):
        raise CheckpointError(f"{where}: shape {shape!r} is malformed.", hint=_REDOWNLOAD)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)):
        raise CheckpointError(f"{where}: data_offsets {offsets!r} is malformed.", hint=_REDOWNLOAD)
    begin, end = offsets
    nbytes = _nbytes(shape, dtype.itemsize)
    if end - begin != nbytes:
        takes = "more bytes than any file has" if nbytes is None else f"{nbytes} bytes"
        raise CheckpointError(
            f"{where}: the header lies: {fields['dtype']} {shape} takes {takes}, its offsets span {end - begin}.",
            hint=_REDOWNLOAD,
        )
    return TensorEntry(name, dtype, tuple(shape), path, data_start + begin, end - begin)


def _check_layout(path: Path, entries: Sequence[TensorEntry], data_start: int, size: int) -> None:
    expected = data_start
    for entry in entries:
        if entry.offset != expected:
            fault = "overlaps the one before it" if entry.offset < expected else "leaves a gap before it"
            raise CheckpointError(f"{path}: the header lies: tensor {entry.name!r} {fault}.", hint=_REDOWNLOAD)
        expected = entry.offset + entry.nbytes
    if size < expected:
        raise CheckpointError(f"{path}: truncated: {size} bytes, its header says {expected}.", hint=_REDOWNLOAD)
    if size > expected:
        raise CheckpointError(
            f"{path}: {size - expected} bytes more than its header says ({expected}).", hint=_REDOWNLOAD
        )
