"""A checkpoint folder: found, checked before any work, and read tensor by tensor.

A tensor is mapped from its shard alone, and unmapped when the last reference to it goes; a shard is never loaded.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qconv.boundary import reading
from qconv.boundary.content import gguf_files
from qconv.boundary.printable import name_of
from qconv.checkpoint.header import TensorEntry, read_header
from qconv.checkpoint.samples import SAMPLE_BYTES, sampled_offsets
from qconv.checkpoint.window import HubFolder, Shard
from qconv.errors import CheckpointError, UsageError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
"""What files of pickled tensors are called."""

_MADV_POPULATE_READ = 22  # Linux 5.14; the mmap module does not name it yet


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

    def crc32(self, name: str, value: int = 0) -> int:
        """CRC-32 of the tensor's bytes as they are stored, going on from ``value``; it errs once in 4 billion.

        Raises:
            CheckpointError: as :meth:`read`.
        """
        for block in self.blocks(name):
            if block.numel():
                value = zlib.crc32(block.contiguous().view(-1).view(torch.uint8).numpy().data, value)
        return value

    def gather(self, name: str, rows: Tensor) -> Tensor:
        """Chosen rows of a 2-D tensor, [len(rows), columns], a copy; only those rows are read.

        Raises:
            CheckpointError: no such tensor, or the file cannot be read.
        """
        entry = self.entry(name)
        if entry.strides:
            return map_tensor(entry)[rows]
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
        return cls(path.entries if isinstance(path, HubFolder) else _entries(path), path, config)

    @property
    def files(self) -> list[Path]:
        """The shards, sorted by name."""
        return sorted({entry.file for entry in self.entries.values()})

    def is_dequantized(self, name: str) -> bool:
        """Whether a tensor is stored quantized, and read as the numbers that it stands for."""
        return False

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
            size = max(entry.offset + entry.span for entry in entries)
            digest.update(f"{path.name} {size}\n".encode())
            with (path.samples if isinstance(path, Shard) else path).open("rb") as file:
                digest.update(file.read(start))
                for offset in sampled_offsets(start, size):
                    file.seek(offset)
                    digest.update(file.read(SAMPLE_BYTES))
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


@contextmanager
def in_config(folder: Path) -> Iterator[None]:
    """Errors about a config.json say in which folder it lies, which those who read it do not know.

    Raises:
        CheckpointError: what the body raises.
    """
    try:
        yield
    except (CheckpointError, UsageError) as error:
        if not error.message.startswith("config.json"):
            raise
        raise type(error)(f"{folder / error.message}", hint=error.hint) from error


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
    shape = (stop - start, *entry.shape[1:])
    return map_tensor(entry.view(entry.name, start * entry.steps[0], shape, entry.steps))


def map_tensor(entry: TensorEntry) -> Tensor:
    """Map one tensor's bytes copy-on-write; of a view whose elements lie apart, copy them.

    Raises:
        CheckpointError: the file cannot be mapped or became shorter.
    """
    require_whole_bytes(entry)
    if entry.nbytes == 0:
        return torch.empty(entry.shape, dtype=entry.dtype)
    page_start = entry.offset - entry.offset % mmap.ALLOCATIONGRANULARITY
    skip = entry.offset - page_start
    try:
        with entry.file.open("rb") as file:
            # MAP_PRIVATE pages stay the page cache's own as long as nobody writes to them.
            view = mmap.mmap(file.fileno(), skip + entry.span, access=mmap.ACCESS_COPY, offset=page_start)
        populate(view)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{entry.file}: cannot read tensor {entry.name!r}: {error}.",
            hint="Check the disk, and that the file did not change during the run.",
        ) from error
    return entry.tensor(torch.frombuffer(view, dtype=torch.uint8, count=entry.span, offset=skip))


def require_whole_bytes(entry: TensorEntry) -> None:
    """Check that torch has a tensor's dtype.

    Raises:
        CheckpointError: its elements share bytes.
    """
    if entry.packed:
        raise CheckpointError(
            f"{entry.file}: tensor {name_of(entry.name)!r} is {entry.packed}.", hint="qconv does not read its values."
        )


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
    weight_map = read_weight_map(path)
    if weight_map is None:
        if (path / SINGLE_NAME).exists():
            return read_header(path / SINGLE_NAME)
        raise _no_weights(path)
    shards = set(weight_map.values())
    missing = sorted(shard for shard in shards if not (path / shard).is_file())
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(shards)} shards missing: {', '.join(map(name_of, missing[:5]))}"
            f"{' ...' if len(missing) > 5 else ''}.",
            hint="Finish the download.",
        )
    return indexed_entries(path, weight_map)


def read_weight_map(path: Path) -> dict[str, str] | None:
    """Of an index, the shard of each tensor by name; None where a folder has no index.

    Raises:
        CheckpointError: the index cannot be read, or names something else than files of the folder, or not the single
            file that lies there too.
    """
    index = path / INDEX_NAME
    if not index.exists() and not index.is_symlink():
        return None
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map.", hint="Download the index again.")
    known: set[str] = set()
    for name, shard in weight_map.items():
        if isinstance(shard, str) and shard in known:
            continue
        if not isinstance(shard, str) or shard in ("", ".", "..") or Path(shard).name != shard or "\0" in shard:
            said = repr(name_of(shard)) if isinstance(shard, str) else f"a {type(shard).__name__}"
            raise CheckpointError(
                f"{index}: tensor {name_of(name)!r} lies in {said}, not a file name.", hint="Download the index again."
            )
        known.add(shard)
    if SINGLE_NAME not in known and (path / SINGLE_NAME).exists():
        raise CheckpointError(
            f"{path}: holds {SINGLE_NAME} and an index of {len(known)} other shards: two models, and readers differ in "
            "which they take.",
            hint=f"Remove the one that is stale: {SINGLE_NAME}, or {INDEX_NAME} with its shards.",
        )
    return weight_map


def _no_weights(path: Path) -> CheckpointError:
    """A folder in which nothing is called as the weights of a checkpoint are: what there is, and what to do."""
    if not path.is_dir():
        return CheckpointError(f"{path}: no such folder.", hint="Give the folder of a checkpoint.")
    found = f"{path}: neither {INDEX_NAME} nor {SINGLE_NAME} is there"
    shards = sorted(file.name for file in path.glob("*.safetensors"))
    if len(shards) > 1:
        return CheckpointError(
            f"{found}, but {len(shards)} other safetensors files, the first {name_of(shards[0])}.",
            hint="The index says which of them belong to the model: download it too.",
        )
    if shards:
        return CheckpointError(f"{found}, but {name_of(shards[0])}.", hint=f"Is it the model? Name it {SINGLE_NAME}.")
    if gguf_files(path):
        return CheckpointError(f"{found}, but GGUF files.", hint="Give the GGUF file itself.")
    if any(any(path.glob(pattern)) for pattern in PICKLED):
        return CheckpointError(f"{found}.", hint="qconv reads safetensors: convert the pickled files first.")
    return CheckpointError(f"{found}.", hint="qconv reads safetensors checkpoints: finish the download.")


def indexed_entries(path: Path, weight_map: Mapping[str, str]) -> dict[str, TensorEntry]:
    """Every tensor of the shards in a folder, each where the index says.

    Raises:
        CheckpointError: a shard cannot be read, or it and the index do not agree.
    """
    entries: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        for name, entry in read_header(path / shard).items():
            if name in entries:
                raise CheckpointError(
                    f"{path}: tensor {name_of(name)!r} is in both {entries[name].file.name} and {shard}.",
                    hint="Remove the stale shard and index, and download them again.",
                )
            if weight_map.get(name) != shard:
                placed = repr(name_of(weight_map[name])) if name in weight_map else "no file"
                raise CheckpointError(
                    f"{path / shard}: holds tensor {name_of(name)!r}, which the index places in {placed}.",
                    hint="Index and shards belong to different downloads.",
                )
            entries[name] = entry
    absent = sorted(name for name in weight_map if name not in entries)
    if absent:
        raise CheckpointError(
            f"{path / weight_map[absent[0]]}: lacks tensor {name_of(absent[0])!r} that the index places there "
            f"({len(absent)} such).",
            hint="Index and shards belong to different downloads.",
        )
    return entries
