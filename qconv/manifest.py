"""The journal of a run: what the output folder belongs to, what is committed, and the lock that keeps others out.

One JSON object a line, each line fsynced before the work goes on. A line torn by a crash is the last one and has no
newline; it is dropped. No line holds a time or a duration, so an interrupted and an undisturbed run write the same
build.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qconv.checkpoint.writer import TEMPORARY_SUFFIX, ShardRecord, output_errors
from qconv.errors import ArtifactError, OutputError, StaleJournalError
from qconv.ownership import WORK_FOLDER as WORK_FOLDER
from qconv.ownership import claim, own_folder

JOURNAL_NAME = "journal.jsonl"


@dataclass(slots=True)
class Journal:
    """The journal's lines, in memory and on disk.

    Attributes:
        path: The file.
        fingerprints: What the run belongs to: weights, recipe, calibration data, versions.
        units: The committed units' records by key.
        activations: By layer index, sha256 and size of the file with the layer's inputs, for those still on disk.
        files: What the run published or was about to publish, by path relative to the output folder: the sha256 that
            such a file may have.
    """

    path: Path
    fingerprints: dict[str, str]
    units: dict[str, dict[str, Any]] = field(default_factory=dict)
    activations: dict[int, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, frozenset[str]] = field(default_factory=dict)

    @classmethod
    def create(cls, path: Path, fingerprints: Mapping[str, str]) -> Journal:
        """Start a journal.

        Raises:
            OutputError: the file cannot be written.
        """
        own_folder(path.parent)
        claim(path)
        journal = cls(path, dict(fingerprints))
        journal._append({"kind": "start", "fingerprints": journal.fingerprints})
        return journal

    @classmethod
    def load(cls, path: Path) -> Journal | None:
        """The journal on disk, or None if there is none or not even its first line was completed.

        Raises:
            ArtifactError: a line is not what qconv writes.
        """
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        complete, _, torn = data.rpartition(b"\n")
        if torn:
            with output_errors(path):
                os.truncate(path, len(data) - len(torn))
        if not complete:
            return None
        journal = None
        for number, line in enumerate(complete.split(b"\n"), start=1):
            try:
                record = json.loads(line)
                if journal is None:
                    journal = cls(path, dict(record["fingerprints"]))
                else:
                    journal._apply(record)
            except (ValueError, KeyError, TypeError) as error:
                raise ArtifactError(
                    f"{path}: line {number} is damaged: {error}.", hint="Start over with --restart."
                ) from error
        return journal

    def require(self, fingerprints: Mapping[str, str]) -> None:
        """Check that the run on disk is the run that was asked for.

        Raises:
            StaleJournalError: names everything that differs.
        """
        require_same(self.path.parent.parent, self.fingerprints, fingerprints)

    def staged(self, name: str) -> Path:
        """Where a file of the build is written before it gets its name: in the work folder, claimed.

        Raises:
            OutputError: the work folder cannot be written.
        """
        return claim(self.path.parent / f"{Path(name).name}{TEMPORARY_SUFFIX}")

    def announce(self, files: Iterable[ShardRecord]) -> None:
        """Record what is about to get its name: a kill right after that leaves a file that the journal knows."""
        listed = [{"name": file.name, "size": file.size, "sha256": file.sha256} for file in files]
        self._append({"kind": "files", "files": listed})

    def commit(self, key: str, record: Mapping[str, Any]) -> None:
        """Record that a unit's shards are published."""
        self._append({"kind": "unit", "unit": key, **record})

    def commit_activations(self, layer: int, size: int, sha256: str) -> None:
        """Record that the inputs of a layer are on disk; those of earlier layers count as gone."""
        self._append({"kind": "activations", "layer": layer, "size": size, "sha256": sha256})

    def _append(self, record: dict[str, Any]) -> None:
        with output_errors(self.path), self.path.open("ab") as file:
            file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if record["kind"] != "start":
            self._apply(record)

    def _apply(self, record: dict[str, Any]) -> None:
        if record["kind"] == "files":
            self._own(record["files"])
        elif record["kind"] == "unit":
            self._own(record.get("files", ()))
            self.units[record["unit"]] = {key: value for key, value in record.items() if key not in ("kind", "unit")}
        elif record["kind"] == "activations":
            self.activations = {record["layer"]: record}
        else:
            raise ValueError(f"unknown kind {record['kind']!r}")

    def _own(self, files: Iterable[Mapping[str, Any]]) -> None:
        for file in files:
            name = str(file["name"])
            self.files[name] = self.files.get(name, frozenset()) | {str(file["sha256"])}


def require_same(folder: Path, found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Check two sets of fingerprints against each other.

    Raises:
        StaleJournalError: names everything that differs.
    """
    changed = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    if changed:
        differences = "; ".join(
            f"{key}: {_short(found.get(key))} there, {_short(wanted.get(key))} now" for key in changed
        )
        raise StaleJournalError(
            f"{folder}: belongs to another run: {', '.join(changed)} changed ({differences}).",
            hint="Give the same inputs to continue it, another folder, or --restart to discard it.",
        )


def _short(value: str | None) -> str:
    return "none" if value is None else value[:12]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the output folder for this process alone.

    The lock is on the folder itself, so it leaves no file behind and ends with the process, however that ends.

    Raises:
        OutputError: another process holds it, or the folder cannot be opened.
    """
    with output_errors(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(
                f"{folder}: another qconv process is writing there.", hint="Wait for it, or choose another folder."
            ) from error
        yield
    finally:
        os.close(descriptor)
