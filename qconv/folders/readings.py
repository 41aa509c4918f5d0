"""What was read of the source, unit by unit, so that a source that changes under a run is found out.

The fingerprint of the weights samples pages. So the journal holds of each unit a checksum over every byte that was read
for it, and they are read again and compared where a shard may have been written since: where its size, inode, time of
modification or time of change is another one. The last of them nobody can set, so as long as all are as they were a
resumed run reads nothing twice.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from qconv.checkpoint.reader import Checkpoint
from qconv.checkpoint.window import Shard
from qconv.core.workers import Workers
from qconv.errors import CheckpointError, StaleJournalError
from qconv.folders.journal import Journal

READ = "read"
"""The key of a unit's checksum in the journal."""

Progress = Callable[[str, int, int], None]


def combined(checksums: Iterable[tuple[str, int]]) -> str:
    """One checksum of those of several tensors or blocks by name, in any order: 16 hexadecimal digits."""
    lines = sorted(f"{name} {checksum:08x}\n" for name, checksum in checksums)
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def checksum(checkpoint: Checkpoint, names: Iterable[str], workers: Workers) -> str:
    """Of tensors as they are stored.

    Raises:
        CheckpointError: one cannot be read.
    """
    listed = list(names)
    return combined(zip(listed, workers.map(checkpoint.crc32, listed), strict=True))


class Shards(Protocol):
    """Files that a run reads."""

    @property
    def files(self) -> list[Path]:
        """All of them."""

    @property
    def path(self) -> Path:
        """Their folder."""


class SourceRecord:
    """What a run has read of its source, and whether that is still there."""

    def __init__(self, checkpoint: Shards, journal: Journal, readings: Mapping[str, Callable[[], str]]) -> None:
        """Look at the shards as they are before the run reads any.

        Args:
            checkpoint: The source.
            journal: Of the run.
            readings: By unit what reads its part of the source again, and gives the checksum of it.
        """
        self._checkpoint = checkpoint
        self.journal = journal
        self._readings = readings
        self._began = self._stamp()

    def require_unchanged(self, progress: Progress) -> None:
        """Check that the source holds what the committed units were made of.

        Raises:
            StaleJournalError: it does not; names the first unit.
            CheckpointError: it cannot be read.
            OutputError: the journal cannot be written.
        """
        now = self._stamp()
        committed = [key for key in self._readings if key in self.journal.units]
        if not committed or self.journal.source == now:
            return
        for done, key in enumerate(committed):
            progress(f"{key}: reading its source again", done, len(committed))
            if self.journal.units[key].get(READ) != self._readings[key]():
                raise StaleJournalError(
                    f"{self._checkpoint.path}: changed since {key} was made of it: its tensors hold other numbers now.",
                    hint="Put the model back that the run began with, or start over with --restart.",
                )
        self.journal.see_source(now)

    def commit(self, key: str, values: Mapping[str, Any]) -> None:
        """Record that a unit is published, if no shard was touched while the run read it.

        Args:
            key: The unit.
            values: What the journal keeps of it, its checksum included.

        Raises:
            CheckpointError: one was.
            OutputError: the journal cannot be written.
        """
        if self._stamp() != self._began:
            raise CheckpointError(
                f"{self._checkpoint.path}: a shard was written, replaced or given other attributes while it was read.",
                hint="The same command compares what was read with what is there now, and goes on if that is the same.",
            )
        if self.journal.source != self._began:
            self.journal.see_source(self._began)
        self.journal.commit(key, values)

    def _stamp(self) -> str:
        """How the shards look from outside; other bytes in one of them make it another stamp."""
        found = hashlib.sha256()
        for file in self._checkpoint.files:
            if isinstance(file, Shard):  # which comes and goes, each time with the checksum that the Hub names
                found.update(f"{file.name} {file.seal}\n".encode())
                continue
            try:
                seen = os.stat(file)
            except OSError as error:
                raise CheckpointError(f"{file}: cannot be read: {error.strerror}.", hint="Put it back.") from error
            facts = (seen.st_size, seen.st_ino, seen.st_mtime_ns, seen.st_ctime_ns)
            found.update(f"{file.name} {facts}\n".encode(errors="surrogateescape"))
        return found.hexdigest()
