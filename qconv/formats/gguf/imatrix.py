"""Importance matrices: the sums of squared inputs of every linear, in llama.cpp's forms.

An entry has one row of sums for a dense linear and one for each expert of merged ones, with the number of tokens behind
it. Only tokens that the router sent to an expert count for it, so some experts have few or none; llama.cpp's K-quants
then decode to zeros without a word. Here such an expert is shrunk toward what its layer sees on average.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValue, GGUFValueType, Keys
from torch import Tensor

from qconv.checkpoint.writer import ShardRecord
from qconv.errors import CheckpointError, UsageError
from qconv.formats.gguf.container import FileLayout, GgufWriter, TensorInfo
from qconv.formats.gguf.header import MAGIC
from qconv.formats.gguf.metadata import Metadata
from qconv.formats.gguf.reader import IMATRIX_TYPE, GgufModel

DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_SUMS, _COUNTS = _SUFFIXES = ".in_sum2", ".counts"

LEGACY_CHUNK_SIZE = 512
"""Tokens of a chunk in the legacy form, which does not say: llama.cpp's default context."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What was seen of one weight's inputs.

    Attributes:
        sums: float32 [experts, in_features], sums of x^2 over the tokens; one row for a dense linear.
        counts: float64 [experts], the tokens of each row.
    """

    sums: Tensor
    counts: Tensor

    def __add__(self, other: Entry) -> Entry:
        return Entry(self.sums + other.sums, self.counts + other.counts)

    def of_experts(self, experts: int) -> Entry:
        """The entry with a row for each expert, where the legacy form put them behind each other in one."""
        if len(self.sums) != 1 or experts < 1 or self.sums.numel() % experts:
            return self
        return Entry(self.sums.reshape(experts, -1), self.counts.expand(experts).clone())

    @property
    def seen(self) -> Tensor:
        """Tokens behind each row, float64 [experts]: none where the sums say nothing.

        Programs that count no experts leave zeros or write ones for an expert that no token reached.
        """
        means = self.sums / self.counts.clamp(min=1.0)[:, None]
        empty = (means == 0.0).all(dim=1)
        if len(means) > 1:
            empty |= (means == 1.0).all(dim=1)
        return torch.where(empty, 0.0, self.counts)

    def mean_squares(self, shrinkage_tokens: float) -> Tensor | None:
        """float64 [experts, in_features]: ``(n H_e + k H_layer) / (n + k)``, None if no row has tokens.

        ``H_e`` is the mean of x^2 over an expert's n tokens, ``H_layer`` that over all experts' tokens, and k is
        ``shrinkage_tokens``: an expert with k tokens is half its own, one without any is its layer's. A dense linear
        is its own layer.
        """
        seen = self.seen
        if not bool(seen.any()):
            return None
        known = torch.where(seen[:, None] > 0.0, self.sums.double(), 0.0)
        layer = known.sum(dim=0) / seen.sum()
        own = known / seen.clamp(min=1e-30)[:, None]
        # Without tokens nothing is its own, also where k is 0.
        share = torch.where(seen > 0.0, seen / (seen + shrinkage_tokens), 0.0)[:, None]
        return torch.lerp(layer.expand_as(own), own, share)  # exact where both are equal


@dataclass(frozen=True, slots=True)
class Imatrix:
    """An importance matrix.

    Attributes:
        entries: By the GGUF name of the weight; one of a file is read when it is asked for.
        datasets: What it was collected on.
        chunk_size: Tokens of a chunk, in which llama.cpp counts.
    """

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...]
    chunk_size: int = LEGACY_CHUNK_SIZE

    @property
    def chunk_count(self) -> int:
        """Chunks that the best-seen weight saw."""
        tokens = max((float(entry.counts.max()) for entry in self.entries.values()), default=0.0)
        return int(tokens) // self.chunk_size

    def entry(self, name: str, rows: int, columns: int) -> Entry | None:
        """The entry of a weight, None if there is none.

        Args:
            name: Its GGUF name.
            rows: Experts of the weight; 1 for a dense one.
            columns: Its in_features.

        Raises:
            UsageError: it is of another model.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        entry = entry.of_experts(rows)
        if tuple(entry.sums.shape) != (rows, columns):
            raise UsageError(
                f"imatrix: {name} has {list(entry.sums.shape)} sums, the model needs {[rows, columns]}.",
                hint="The imatrix is of another model.",
            )
        return entry


def merge(parts: Iterable[Imatrix]) -> Imatrix:
    """One matrix of several, as if all their tokens had been seen at once.

    Raises:
        UsageError: they are of different models, or there are none.
    """
    entries: dict[str, Entry] = {}
    datasets: list[str] = []
    chunk_sizes = []
    for part in parts:
        for name, entry in part.entries.items():
            if name not in entries:
                entries[name] = entry
                continue
            experts = max(len(entry.sums), len(entries[name].sums))
            one, other = entries[name].of_experts(experts), entry.of_experts(experts)
            if one.sums.shape != other.sums.shape:
                raise UsageError(
                    f"imatrix: {name} has {list(one.sums.shape)} sums in one file and {list(other.sums.shape)} in "
                    "another.",
                    hint="They are of different models.",
                )
            entries[name] = one + other
        datasets += [name for name in part.datasets if name not in datasets]
        chunk_sizes.append(part.chunk_size)
    if not chunk_sizes:
        raise UsageError("imatrix: nothing to merge.")
    return Imatrix(entries, tuple(datasets), chunk_sizes[0])


def write_imatrix(
    path: Path,
    matrix: Imatrix,
    temporary: Path | None = None,
    announce: Callable[[Sequence[ShardRecord]], None] = lambda _: None,
) -> ShardRecord:
    """Write the GGUF form, entries by name.

    Args:
        path: The file.
        matrix: What it will hold.
        temporary: Where it is written first; beside it by default.
        announce: Told what the file is once it is checked and before it gets its name.

    Raises:
        UsageError: a name is too long, or an entry or the list of datasets is empty.
        OutputError: the file cannot be written.
    """
    if not matrix.entries or not matrix.datasets:
        raise UsageError("imatrix: no entries, or not said on what it was collected.")
    metadata: Metadata = {
        Keys.General.TYPE: GGUFValue(IMATRIX_TYPE, GGUFValueType.STRING),
        DATASETS: GGUFValue(list(matrix.datasets), GGUFValueType.ARRAY),
        CHUNK_COUNT: GGUFValue(matrix.chunk_count, GGUFValueType.UINT32),
        CHUNK_SIZE: GGUFValue(matrix.chunk_size, GGUFValueType.UINT32),
    }
    infos = []
    for name in sorted(matrix.entries):
        shape = tuple(matrix.entries[name].sums.shape)
        infos += [_info(name + _SUMS, shape), _info(name + _COUNTS, (shape[0], 1))]
    with GgufWriter(path.parent, FileLayout(path.name, metadata, tuple(infos)), temporary) as writer:
        for name in sorted(matrix.entries):
            entry = matrix.entries[name]
            for suffix, values in ((_SUMS, entry.sums), (_COUNTS, entry.counts)):
                writer.write_blocks(name + suffix, [values.float().contiguous().view(torch.uint8)])
        record = writer.finish()
        announce([record])
        writer.publish()
    return record


def _info(name: str, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(name, GGMLQuantizationType.F32, shape)


def read_imatrix(path: Path) -> Imatrix:
    """Read either form.

    Raises:
        CheckpointError: unreadable, damaged, no importance matrix, or values that are negative or not finite.
    """
    try:
        with path.open("rb") as file:
            is_gguf = file.read(len(MAGIC)) == MAGIC
        matrix = _read_gguf(path) if is_gguf else _read_legacy(path, path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror}.", hint="Check the file and the disk.") from error
    for name, entry in matrix.entries.items():
        for values in (entry.sums, entry.counts):
            if not bool(((values >= 0.0) & (values < math.inf)).all()):
                raise _damaged(path, f"{name} holds values that are negative or not finite")
    return matrix


def _read_gguf(path: Path) -> Imatrix:
    model = GgufModel.open(path)
    if model.metadata.get(Keys.General.TYPE) != IMATRIX_TYPE:
        raise _damaged(path, f"general.type is {model.metadata.get(Keys.General.TYPE)!r}, not imatrix")
    names = sorted(
        {name.removesuffix(_SUMS).removesuffix(_COUNTS) for name in model.entries if name.endswith(_SUFFIXES)}
    )
    for name in names:
        for suffix, what in ((_SUMS, "sums"), (_COUNTS, "counts")):
            if name + suffix not in model.entries:
                raise _damaged(path, f"{name} lacks its {what}")
    if not names:
        raise _damaged(path, "no entries")
    entries = _StoredEntries(model, path, tuple(names))
    datasets = model.metadata.get(DATASETS)
    chunk_size = model.metadata.get(CHUNK_SIZE)
    return Imatrix(
        entries,
        tuple(datasets) if isinstance(datasets, list) else (),
        chunk_size if isinstance(chunk_size, int) and chunk_size > 0 else LEGACY_CHUNK_SIZE,
    )


@dataclass(frozen=True, slots=True)
class _StoredEntries(Mapping[str, Entry]):
    """Entries of a file, each read when it is asked for: those of a large model are larger than all else in memory."""

    model: GgufModel
    path: Path
    names: tuple[str, ...]

    def __getitem__(self, name: str) -> Entry:
        if name not in self:
            raise KeyError(name)
        sums, counts = (_floats(self.model, self.path, name + suffix) for suffix in _SUFFIXES)
        if counts.numel() not in (1, len(sums)):
            raise _damaged(self.path, f"{name} has {len(sums)} rows of sums and {counts.numel()} counts")
        return Entry(sums, counts.flatten().double().expand(len(sums)).clone())

    def __contains__(self, name: object) -> bool:
        return f"{name}{_SUMS}" in self.model.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _floats(model: GgufModel, path: Path, name: str) -> Tensor:
    if model.entry(name).type != GGMLQuantizationType.F32:
        raise _damaged(path, f"{name} is {model.entry(name).type.name}, not F32")
    return torch.cat(list(model.dequantized(name)))


def _read_legacy(path: Path, data: bytes) -> Imatrix:
    """Entries of mean squares times the number of calls; experts behind each other, not counted one by one."""
    position = 0

    def take(count: int) -> bytes:
        nonlocal position
        if not 0 <= count <= len(data) - position:
            raise _damaged(path, "neither a GGUF nor a legacy importance matrix, or truncated")
        position += count
        return data[position - count : position]

    def integer() -> int:
        return int(struct.unpack("<i", take(4))[0])

    entries: dict[str, Entry] = {}
    for _ in range(integer()):
        name = take(integer()).decode(errors="replace")
        calls, values = integer(), integer()
        means = np.frombuffer(take(4 * values), dtype="<f4")
        if calls < 1 or values < 1 or name in entries:
            raise _damaged(path, f"{name}: {calls} calls, {values} values, or there twice")
        tokens = float(calls * LEGACY_CHUNK_SIZE)
        sums = torch.from_numpy(means * np.float32(LEGACY_CHUNK_SIZE))[None, :]
        entries[name] = Entry(sums, torch.tensor([tokens], dtype=torch.float64))
    if not entries:
        raise _damaged(path, "no entries")
    datasets: tuple[str, ...] = ()
    if len(data) - position >= 8:  # older files end here
        integer()  # the last chunk
        datasets = (take(integer()).decode(errors="replace"),)
    return Imatrix(entries, datasets)


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}.", hint="Give an importance matrix of llama.cpp or qconv.")
