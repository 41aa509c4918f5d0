"""The journal of a run: what the output folder belongs to, what is committed, and the lock that keeps others out.

One JSON object a line, each line fsynced before the work goes on. A line torn by a crash is the last one and has no
newline; it is dropped. Every line but the first ends with a checksum of itself, so that a damaged one is found whatever
the damage; the first says what the run belongs to, and a change of it is named. No line holds a time or a duration, so
an interrupted and an undisturbed run write the same build.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qconv.boundary.reading import parse_json
from qconv.checkpoint.writer import TEMPORARY_SUFFIX, ShardRecord, output_errors
from qconv.errors import ArtifactError, OutputError, StaleJournalError
from qconv.folders.ownership import WORK_FOLDER as WORK_FOLDER
from qconv.folders.ownership import claim, own_folder

JOURNAL_NAME = "journal.jsonl"
PROCESSOR = "processor"
"""Among fingerprints what is no input: the name, for people, of what has the ``arithmetic`` beside it."""
COMPANIONS = "companions"
"""Among fingerprints that of the files which only travel with a build: others are copied, whatever was there before."""

_RESTART = "Start over with --restart."
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SHOWN = 12
"""Digits of a digest in a message, where so many tell two apart."""


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
        source: How the source's files looked when all that was committed was known to be made of them; None before.
    """

    path: Path
    fingerprints: dict[str, str]
    units: dict[str, dict[str, Any]] = field(default_factory=dict)
    activations: dict[int, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, frozenset[str]] = field(default_factory=dict)
    source: str | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

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
            OutputError: it is no file, or cannot be read.
        """
        try:
            with output_errors(path):
                data = path.read_bytes()
        except OutputError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
        complete, _, torn = data.rpartition(b"\n")
        if torn:
            with output_errors(path):
                os.truncate(path, len(data) - len(torn))
        if not complete:
            return None
        first, *rest = complete.split(b"\n")
        start = _parse(first, f"{path}: line 1 is damaged")
        journal = cls(path, require_fingerprints(start.get("fingerprints"), f"{path}: line 1 is damaged", _RESTART))
        for number, line in enumerate(rest, start=2):
            where = f"{path}: line {number} is damaged"
            try:
                journal._apply(_parse(_unsealed(line, where), where))
            except (ValueError, KeyError, TypeError) as error:
                raise ArtifactError(f"{where}: {error}.", hint=_RESTART) from error
        return journal

    def require(self, fingerprints: Mapping[str, str]) -> None:
        """Check that the run on disk is the run that was asked for; it goes on with that one's companions.

        Raises:
            StaleJournalError: names everything that differs.
        """
        require_same(self.path.parent.parent, self.fingerprints, fingerprints)
        self.fingerprints = dict(fingerprints)

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

    def committed(self) -> dict[str, dict[str, Any]]:
        """The units as they are now, whatever another thread commits meanwhile."""
        with self._lock:
            return dict(self.units)

    def commit_activations(self, layer: int, size: int, sha256: str, read: int | None = None) -> None:
        """Record that the inputs of a layer are on disk; those of earlier layers count as gone.

        Args:
            layer: Its index.
            size, sha256: Of the file.
            read: Checksum of what was read for them besides the layers before.
        """
        self._append({"kind": "activations", "layer": layer, "size": size, "sha256": sha256, "read": read})

    def see_source(self, stamp: str) -> None:
        """Record how the source's files look."""
        self._append({"kind": "source", "stamp": stamp})

    def _append(self, record: dict[str, Any]) -> None:
        with self._lock:
            self._write(record)
            if record["kind"] != "start":
                self._apply(record)

    def _write(self, record: dict[str, Any]) -> None:
        with output_errors(self.path), self.path.open("ab") as file:
            line = json.dumps(record, separators=(",", ":")).encode()
            file.write((line if record["kind"] == "start" else _sealed(line)) + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _apply(self, record: dict[str, Any]) -> None:
        if record["kind"] == "files":
            self._own(record["files"])
        elif record["kind"] == "unit":
            self._own(record.get("files", ()))
            self.units[record["unit"]] = {key: value for key, value in record.items() if key not in ("kind", "unit")}
        elif record["kind"] == "activations":
            self.activations = {record["layer"]: record}
        elif record["kind"] == "source":
            self.source = record["stamp"]
        else:
            raise ValueError(f"unknown kind {record['kind']!r}")

    def _own(self, files: Iterable[Mapping[str, Any]]) -> None:
        for file in files:
            name = str(file["name"])
            self.files[name] = self.files.get(name, frozenset()) | {str(file["sha256"])}


def _parse(line: bytes, where: str) -> dict[str, Any]:
    record = parse_json(line, where, ArtifactError, hint=_RESTART)
    if not isinstance(record, dict):
        raise ArtifactError(f"{where}: it holds no JSON object.", hint=_RESTART)
    return record


def _sealed(line: bytes) -> bytes:
    """A JSON object's text with the checksum of that text as its last key."""
    return b'%b,"sum":"%b"}' % (line[:-1], _sum(line))


def _unsealed(line: bytes, where: str) -> bytes:
    """The text that :func:`_sealed` was given.

    Raises:
        ArtifactError: it was another one.
    """
    text, _, found = line.rpartition(b',"sum":"')
    text += b"}"
    if found != _sum(text) + b'"}':
        raise ArtifactError(f"{where}: it does not have its checksum.", hint=_RESTART)
    return text


def _sum(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:16].encode()


def require_fingerprints(value: object, where: str, hint: str) -> dict[str, str]:
    """Fingerprints as a file holds them.

    Raises:
        ArtifactError: they are not what qconv writes.
    """
    if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
        raise ArtifactError(f"{where}: it names no fingerprints.", hint=hint)
    return value


def require_same(
    folder: Path, found: Mapping[str, str], wanted: Mapping[str, str], ignored: Collection[str] = ()
) -> None:
    """Check two sets of fingerprints against each other.

    Args:
        folder: What they belong to.
        found: Those on disk.
        wanted: Those of what was asked for.
        ignored: Keys that may differ.

    Raises:
        StaleJournalError: names everything that differs.
    """
    keys = {*found, *wanted} - {*ignored, PROCESSOR, COMPANIONS}
    changed = sorted(key for key in keys if found.get(key) != wanted.get(key))
    if changed:
        differences = []
        for key in changed:
            there, now = differing(found.get(key), wanted.get(key))
            if key == "arithmetic":
                there, now = (f"{text} ({of.get(PROCESSOR, '?')})" for text, of in ((there, found), (now, wanted)))
            differences.append(f"{key}: {there} there, {now} now")
        raise StaleJournalError(
            f"{folder}: belongs to another run: {', '.join(changed)} changed ({'; '.join(differences)}).",
            hint="Give the same inputs to continue it, another folder, or --restart to discard it.",
        )


def differing(found: str | None, wanted: str | None) -> tuple[str, str]:
    """Two different fingerprints as a message shows them: as short as it goes, and never alike.

    Of values that consist of ``name=value`` pairs only the pairs that differ are shown, in full.
    """
    pairs, others = _pairs(found), _pairs(wanted)
    if pairs is not None and others is not None:
        names = sorted(name for name in {*pairs, *others} if pairs.get(name) != others.get(name))
        if names:
            there, now = (" ".join(f"{name}={of.get(name, 'none')}" for name in names) for of in (pairs, others))
            return there, now
    texts = ["none" if value is None else value for value in (found, wanted)]
    cut = [text[:_SHOWN] if _DIGEST.fullmatch(text) else text for text in texts]
    there, now = cut if cut[0] != cut[1] else texts
    return there, now


def _pairs(value: str | None) -> dict[str, str] | None:
    """The pairs of which a value consists, None if of something else."""
    parts = [part.partition("=") for part in (value or "").split()]
    return {name: text for name, _, text in parts} if parts and all(equals for _, equals, _ in parts) else None


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
