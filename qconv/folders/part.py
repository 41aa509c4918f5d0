"""The part that one build has in the journal and the work folder of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qconv.checkpoint.writer import TEMPORARY_SUFFIX, ShardRecord
from qconv.folders.journal import Journal
from qconv.folders.ownership import claim
from qconv.folders.readings import SourceRecord


@dataclass(frozen=True, slots=True)
class Part:
    """A build's part: its keys and files without what tells them from other builds'.

    A run of one build has no name for it, and its part is the whole journal. Of several, each has a folder of its name
    within the run's; it stands before the keys, the published files and the files of the work folder.

    Attributes:
        record: What was read of the source, and the journal.
        name: Of the build; empty for the only one.
    """

    record: SourceRecord
    name: str = ""

    @property
    def journal(self) -> Journal:
        """Of the run."""
        return self.record.journal

    @property
    def units(self) -> dict[str, dict[str, Any]]:
        """The committed units' records by key, their files by path relative to the build's folder."""
        found = own(self.journal.committed(), self.name)
        for key, record in found.items() if self.name else ():
            if "files" in record:
                names = (file["name"].removeprefix(f"{self.name}/") for file in record["files"])
                files = [{**file, "name": name} for file, name in zip(record["files"], names, strict=True)]
                found[key] = {**record, "files": files}
        return found

    @property
    def files(self) -> dict[str, frozenset[str]]:
        """What was published or was about to be, by path within the build's folder: the sha256 that it may have."""
        return own(dict(self.journal.files), self.name)

    def scratch(self, name: str) -> Path:
        """The path of a file of the work folder."""
        return self.journal.path.parent / (f"{self.name}-{name}" if self.name else name)

    def staged(self, name: str) -> Path:
        """Where a file of the build is written before it gets its name: in the work folder, claimed.

        Raises:
            OutputError: the work folder cannot be written.
        """
        return claim(self.scratch(f"{Path(name).name}{TEMPORARY_SUFFIX}"))

    def announce(self, files: Iterable[ShardRecord]) -> None:
        """Record what is about to get its name: see :meth:`Journal.announce`."""
        self.journal.announce(replace(file, name=key_of(self.name, file.name)) for file in files)

    def note(self, key: str, values: Mapping[str, Any]) -> None:
        """Record that something is safe that was made of other units alone."""
        self.journal.commit(key_of(self.name, key), values)

    def commit(self, key: str, values: Mapping[str, Any]) -> None:
        """Record that a unit is published, if no shard of the source was touched: see :meth:`SourceRecord.commit`.

        Raises:
            CheckpointError: one was.
            OutputError: the journal cannot be written.
        """
        kept = dict(values)
        if "files" in kept:
            kept["files"] = [{**file, "name": key_of(self.name, file["name"])} for file in kept["files"]]
        self.record.commit(key_of(self.name, key), kept)


def key_of(name: str, key: str) -> str:
    """A key, or a path in a build's folder, as the run's journal has it."""
    return f"{name}/{key}" if name else key


def own(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The values of one build by its own keys, of values by the journal's."""
    if not name:
        return dict(values)
    prefix = key_of(name, "")
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
