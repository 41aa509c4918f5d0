"""A checkpoint folder: found, checked before any work, and read tensor by tensor.

A tensor is mapped from its shard alone, and unmapped when the last reference to it goes; a shard is never loaded.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qconv import reading
from qconv.checkpoint.header import TensorEntry, read_header
from qconv.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_MADV_POPULATE_READ = 22  # Linux 5.14; the mmap module does not name it yet
_SAMPLES_PER_SHARD = 64
_SAMPLE_BYTES = 4096


BLOCK_BYTES = 16 * 2**20
"""How much of a large tensor is mapped at once where it is worked through block by block."""


@dataclass(frozen=True, slots=True)
class Tensors:
    """Tensors in files, by name."""

    entries: Mapping[str, TensorEntry]

    def entry(self, name: str) -> TensorEntry:
        """Where a tensor lies.

        Raises:
            CheckpointError: no tensor of that name.
        """
        try:
            return self.entries[name]
        except KeyError:
            raise CheckpointError(f"no tensor {name!r}.", hint="The checkpoint is incomplete.") from None

    def read(self, name: str) -> Tensor:
        """The tensor in its stored dtype and shape, mapped copy-on-write: writing to it changes no file.

        Raises:
            CheckpointError: no such tensor, the file cannot be mapped, or it changed size since it was opened.
        """
        return map_tensor(self.entry(name))

    def blocks(self, name: str, multiple: int = 1) -> Iterator[Tensor]:
        """The tensor as consecutive blocks of rows, each mapped on its own, so that memory holds one of them.

        Each begins at a multiple of ``multiple`` rows.

        Raises:
            CheckpointError: as :meth:`read`.
        """
        entry = self.entry(name)
        if not entry.shape:
            yield map_tensor(entry)
            return
        for start, stop in row_ranges(entry, multiple):
            yield map_rows(entry, start, stop)

    def gather(self, name: str, rows: Tensor) -> Tensor:
        """Chosen rows of a 2-D tensor, [len(rows), columns], a copy; only those rows are read.

        Raises:
            CheckpointError: no such tensor, or the file cannot be read.
        """
        entry = self.entry(name)
        row_bytes = entry.nbytes // entry.shape[0]
        wanted, inverse = torch.unique(rows, return_inverse=True)
        found = torch.empty(len(wanted), row_bytes, dtype=torch.uint8)
        try:
            with entry.file.open("rb") as file:
                for row, target in zip(wanted.tolist(), found, strict=True):
                    os.preadv(file.fileno(), [target.numpy().data], entry.offset + row * row_bytes)
        except OSError as error:
            raise CheckpointError(
                f"{entry.file}: cannot read tensor {name!r}: {error.strerror}.", hint="Check the disk."
            ) from error
        return found.view(entry.dtype)[inverse]


@dataclass(frozen=True, slots=True)
class Checkpoint(Tensors):
    """A folder of safetensors shards whose headers agree with its index and with the files' sizes.

    Attributes:
        entries: Every tensor by name.
        path: The folder.
        config: config.json.
    """

    path: Path
    config: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read config.json, the index and every shard's header.

        Raises:
            CheckpointError: a file missing, truncated or malformed, a tensor missing from its shard or there twice.
        """
        config = read_json(path / "config.json")
        return cls(_entries(path), path, config)

    @property
    def files(self) -> list[Path]:
        """The shards, sorted by name."""
        return sorted({entry.file for entry in self.entries.values()})

    def fingerprint(self) -> str:
        """sha256 over config.json and, of every shard, its name, size, header and 64 pages spread evenly.

        Reading a 960 GB model twice only to hash it would cost hours; headers and samples of every shard tell apart
        any two different sets of weights that were really trained or converted, though not a single flipped bit.
        """
        digest = hashlib.sha256()
        digest.update(json.dumps(self.config, sort_keys=True).encode())
        for path in self.files:
            entries = [entry for entry in self.entries.values() if entry.file == path]
            start = min(entry.offset for entry in entries)
            size = max(entry.offset + entry.nbytes for entry in entries)
            digest.update(f"{path.name} {size}\n".encode())
            stride = max((size - start) // _SAMPLES_PER_SHARD, _SAMPLE_BYTES)
            with path.open("rb") as file:
                digest.update(file.read(start))
                for offset in range(start, size, stride):
                    file.seek(offset)
                    digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing, unreadable, not JSON, not an object.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file.", hint="Is this the folder of a Hugging Face checkpoint?")
    values = reading.read_json(path, CheckpointError, hint="Download it again.")
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a JSON object.", hint="Download it again.")
    return values


def row_ranges(entry: TensorEntry, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges ``start, stop`` of a tensor's rows that take at most :data:`BLOCK_BYTES` each, or ``multiple`` rows.

    Each begins at a multiple of ``multiple`` rows.
    """
    rows = entry.shape[0]
    step = max(1, rows)
    if entry.nbytes > BLOCK_BYTES:
        step = max(1, BLOCK_BYTES // (entry.nbytes // rows * multiple)) * multiple
    for start in range(0, max(1, rows), step):
        yield start, min(start + step, rows)


def map_rows(entry: TensorEntry, start: int, stop: int) -> Tensor:
    """Map a range of a tensor's rows copy-on-write, [stop - start, ...].

    Raises:
        CheckpointError: as :func:`map_tensor`.
    """
    row_bytes = entry.nbytes // max(1, entry.shape[0])
    offset, nbytes = entry.offset + start * row_bytes, (stop - start) * row_bytes
    return map_tensor(replace(entry, offset=offset, nbytes=nbytes, shape=(stop - start, *entry.shape[1:])))


def map_tensor(entry: TensorEntry) -> Tensor:
    """Map one tensor's bytes copy-on-write.

    Raises:
        CheckpointError: the file cannot be mapped or became shorter.
    """
    if entry.nbytes == 0:
        return torch.empty(entry.shape, dtype=entry.dtype)
    page_start = entry.offset - entry.offset % mmap.ALLOCATIONGRANULARITY
    skip = entry.offset - page_start
    try:
        with entry.file.open("rb") as file:
            # MAP_PRIVATE pages stay the page cache's own as long as nobody writes to them.
            view = mmap.mmap(file.fileno(), skip + entry.nbytes, access=mmap.ACCESS_COPY, offset=page_start)
        populate(view)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{entry.file}: cannot read tensor {entry.name!r}: {error}.",
            hint="Check the disk, and that the file did not change during the run.",
        ) from error
    raw = torch.frombuffer(view, dtype=torch.uint8, count=entry.nbytes, offset=skip)
    if entry.offset % entry.dtype.itemsize:
        raw = raw.clone()
    return raw.view(entry.dtype).view(entry.shape)


def populate(view: mmap.mmap, start: int = 0, nbytes: int | None = None) -> None:
    """Read a mapping, or a part of it, in now: a failing disk is an OSError here, and a fatal signal later.

    Raises:
        OSError: the disk failed, or the file became shorter.
    """
    first = start - start % mmap.PAGESIZE
    length = (len(view) if nbytes is None else start + nbytes) - first
    try:
        view.madvise(_MADV_POPULATE_READ, first, length)
    except OSError as error:
        if error.errno != errno.EINVAL:  # kernels before 5.14 do not know the advice
            raise
        view.madvise(mmap.MADV_WILLNEED, first, length)


def require_finite(tensor: Tensor, entry: TensorEntry, first_row: int = 0) -> Tensor:
    """``tensor`` itself, once it is known to hold no NaN and no infinity.

    Args:
        tensor: The entry's tensor, or the block of its rows that begins at ``first_row``.
        entry: What it is called and where it lies.
        first_row: The block's place in the tensor.

    Raises:
        CheckpointError: names file, tensor, how many elements are not finite and the first one's position.
    """
    # A NaN or an infinity makes its row's sum not finite, and sums run an order faster than a test of each element.
    if bool(torch.isfinite(tensor.sum(dim=-1).float().sum())):
        return tensor
    bad = torch.nonzero(~torch.isfinite(tensor))
    if len(bad) == 0:
        return tensor
    position = bad[0].tolist()
    position[:1] = [index + first_row for index in position[:1]]
    raise CheckpointError(
        f"{entry.file}: tensor {entry.name!r} holds {len(bad)} values that are not finite, the first at {position}.",
        hint="The weights are damaged: download the shard again, or repair the model before quantizing it.",
    )


def _entries(path: Path) -> dict[str, TensorEntry]:
    index_path = path / INDEX_NAME
    if not index_path.exists():
        if (path / SINGLE_NAME).exists():
            return read_header(path / SINGLE_NAME)
        raise CheckpointError(
            f"{path}: neither {INDEX_NAME} nor {SINGLE_NAME} is there.",
            hint="qconv reads safetensors checkpoints; convert pickled ones (*.bin) first.",
        )
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: no weight_map.", hint="Download the index again.")
    shards = set()
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index_path}: tensor {name!r} lies in {shard!r}, not a file name.")
        shards.add(shard)
    missing = sorted(shard for shard in shards if not (path / shard).is_file())
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(shards)} shards missing: {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}.",
            hint="Finish the download.",
        )
    entries: dict[str, TensorEntry] = {}
    for shard in sorted(shards):
        for name, entry in read_header(path / shard).items():
            if name in entries:
                raise CheckpointError(
                    f"{path}: tensor {name!r} is in both {entries[name].file.name} and {shard}.",
                    hint="Remove the stale shard and index, and download them again.",
                )
            if weight_map.get(name) != shard:
                raise CheckpointError(
                    f"{path / shard}: holds tensor {name!r}, which the index places in {weight_map.get(name)!r}.",
                    hint="Index and shards belong to different downloads.",
                )
            entries[name] = entry
    absent = sorted(name for name in weight_map if name not in entries)
    if absent:
        raise CheckpointError(
            f"{path / weight_map[absent[0]]}: lacks tensor {absent[0]!r} that the index places there "
            f"({len(absent)} such).",
            hint="Index and shards belong to different downloads.",
        )
    return entries
