"""What a checkpoint holds beside its model, as far as an index and the shards that are here tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qconv.artifacts.opening import viewed_names
from qconv.artifacts.source import listed_files
from qconv.artifacts.storage import Storage
from qconv.artifacts.verbatim import Verbatim, verbatim_of
from qconv.checkpoint.header import read_header
from qconv.checkpoint.quantized import QuantizedCheckpoint
from qconv.checkpoint.reader import INDEX_NAME, Checkpoint, read_json
from qconv.core.architecture import Architecture
from qconv.models.discovery import left_out

MAX_BYTES = 2**50
"""Of a checkpoint: a thousand times what the largest one has."""


@dataclass(frozen=True, slots=True)
class Beside:
    """Tensors that transformers' own model of the type leaves out.

    Attributes:
        names: All of them, by the index.
        verbatim: What a build copies; nothing where :attr:`unseen` are.
        nbytes: Bytes that each copied one takes in the source, its scales included.
        unseen: Of how many the shards are not here, so that no size is known.
        listed_bytes: What the index says that all tensors of the checkpoint take, the model's included, where some are
            unseen; None where it does not say.
    """

    names: frozenset[str]
    verbatim: tuple[Verbatim, ...]
    nbytes: Mapping[str, int]
    unseen: int
    listed_bytes: int | None = None

    @classmethod
    def of(
        cls, path: Path, config: dict[str, Any], model: Architecture, storage: Storage | None, dtype: torch.dtype
    ) -> Beside:
        """Of the checkpoint in a folder.

        Args:
            path: The folder.
            config: Its config.json.
            model: The model that this describes.
            storage: How weights are stored quantized, if they are.
            dtype: What such weights are read as.

        Raises:
            CheckpointError: a shard that is here is damaged, or what it holds cannot be copied.
        """
        listed, expected = listed_files(path), {name for name, _ in model.tensors()} | model.ignorable()
        names = left_out(config, model, listed.keys() & (viewed_names(config, model, listed) - expected))
        files = {path / listed[name] for name in names}
        if not all(file.is_file() for file in files):
            absent = sum(not (path / listed[name]).is_file() for name in names)
            return cls(frozenset(names), (), {}, absent, _listed_bytes(path))
        entries = {name: one for file in sorted(files) for name, one in read_header(file).items() if name in names}
        stored = Checkpoint(entries, path, config)
        leaves = () if storage is None else storage.marks
        quantized = any(name.rpartition(".")[2] in leaves for name in entries)
        dense = stored if storage is None or not quantized else storage.read(stored, dtype)
        nbytes = {name: entry.nbytes for name, entry in dense.entries.items()}
        if isinstance(dense, QuantizedCheckpoint):
            for name in dense.codes:
                nbytes[name] = sum(entry.nbytes for entry in dense.made_of(name))
        return cls(frozenset(names), verbatim_of(dense, model, dense.entries), nbytes, 0)

    def guessed_bytes(self, model_bytes: int) -> int:
        """About how many bytes the unseen ones take in the source, whose model takes so many; 0 if nothing tells."""
        return 0 if self.listed_bytes is None else max(0, self.listed_bytes - model_bytes)

    def notice(self, guessed: int) -> str:
        """What is known of their sizes, as a sentence without its end."""
        counted = f"counted as the {guessed:,} bytes that the index leaves for them" if guessed else "not counted here"
        return (
            f"{len(self.names):,} tensors beside the model are copied as they are, and {counted}: the shards of "
            f"{self.unseen:,} of them are not here"
        )


def _listed_bytes(path: Path) -> int | None:
    """What an index says that all tensors take."""
    metadata = read_json(path / INDEX_NAME).get("metadata")
    size = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    return size if isinstance(size, int) and not isinstance(size, bool) and 0 < size < MAX_BYTES else None
