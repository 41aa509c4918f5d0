"""The history of runs: one SQLite file (WAL) of records, and their arrays beside it by content hash.

A history is a folder. ``history.sqlite`` holds every run's record whole, with what is looked up in columns of its own;
``files/`` holds what the records name by sha256, so that a run's own folder may go once it is added.

Runs come in the order in which they were added, which their numbers tell. When they were made is for people: a clock
that was ahead once must not make its run the newest for ever.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconv.errors import ArtifactError, OutputError, UsageError
from qconv.evaluation.kept_files import load, store
from qconv.evaluation.record import FileRef, Run, parse_run

DATABASE_NAME = "history.sqlite"
SCHEMA_VERSION = 1
_WAIT_SECONDS = 20.0
_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_UNUSABLE = frozenset(
    {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY}
)
"""What the system says no to; everything else that SQLite finds wrong with a database is damage."""
_UNREADABLE = "Use the version that wrote it, or begin a new history."
_SCHEMA = """
CREATE TABLE runs (
    id INTEGER PRIMARY KEY,
    digest TEXT NOT NULL,
    started TEXT NOT NULL,
    name TEXT NOT NULL,
    build_sha256 TEXT NOT NULL,
    suite TEXT NOT NULL,
    suite_sha256 TEXT NOT NULL,
    outcome TEXT NOT NULL,
    accepted INTEGER NOT NULL,
    record TEXT NOT NULL,
    UNIQUE (digest, started)
);
CREATE INDEX runs_by_name ON runs (name, suite, started);
CREATE TABLE metrics (
    run INTEGER NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
    task TEXT NOT NULL,
    metric TEXT NOT NULL,
    value REAL,
    low REAL,
    high REAL,
    PRIMARY KEY (run, task, metric)
) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """A run in the history.

    Attributes:
        id: Its number.
        name: What its build is followed under, from night to night.
        accepted: Whether it may serve as the baseline of later runs.
        run: The record.
    """

    id: int
    name: str
    accepted: bool
    run: Run


@dataclass(frozen=True, slots=True)
class Point:
    """One metric of one run, in a trend."""

    id: int
    started: str
    build_sha256: str
    outcome: str
    value: float | None
    low: float | None
    high: float | None


_NUMBER = (float, int, type(None))


class History:
    """Open with :meth:`open`; a history that does not exist yet is made."""

    def __init__(self, folder: Path, database: sqlite3.Connection) -> None:
        self.folder = folder
        self._database = database

    @classmethod
    @contextmanager
    def open(cls, folder: Path, *, create: bool = True) -> Iterator[History]:
        """The history in a folder. Several processes may have it open at once.

        Raises:
            UsageError: there is none, and ``create`` is false.
            ArtifactError: it is damaged, or of a newer version.
            OutputError: it cannot be written.
        """
        path = folder / DATABASE_NAME
        if not create and not path.exists():
            raise UsageError(f"{folder}: no history there.", hint="qconv nightly makes one, or eval history --add RUN.")
        if (folder.exists() and not folder.is_dir()) or (path.exists() and not path.is_file()):
            raise OutputError(
                f"{path}: is no file within a folder.", hint="Give the folder of a history, or a new one."
            )
        with _errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(path, timeout=_WAIT_SECONDS)
        with closing(database):
            with _errors(path):
                _prepare(path, database)
            yield cls(folder, database)

    def add(self, source: Path, run: Run, *, name: str | None = None, accepted: bool | None = None) -> Entry:
        """Add a run with its files; one that is there already is left as it is.

        Args:
            source: The run's folder.
            run: Its record.
            name: What its build is followed under; the build's own name by default.
            accepted: Whether it may be a baseline; by default where its verdict is a pass.

        Raises:
            ArtifactError: a file of the run is absent or damaged.
            OutputError: the history cannot be written.
        """
        followed = run.build.name if name is None else name
        good = run.verdict.outcome == "pass" if accepted is None else accepted
        values = (
            run.digest,
            run.started,
            followed,
            run.build.sha256,
            run.suite,
            run.suite_sha256,
            run.verdict.outcome,
            int(good),
            run.model_dump_json(),
        )
        columns = "digest, started, name, build_sha256, suite, suite_sha256, outcome, accepted, record"
        with _errors(self.folder / DATABASE_NAME), self._database as database:
            database.execute("BEGIN IMMEDIATE")  # also keeps two processes from writing the same file
            for file in files_of(run):
                store(self.folder, load(source, file), Path(file.name).suffix)
            places = ", ".join("?" * len(values))
            statement = f"INSERT OR IGNORE INTO runs ({columns}) VALUES ({places}) RETURNING id"
            inserted = database.execute(statement, values).fetchone()
            if inserted is not None:
                rows = [
                    (inserted[0], task.name, metric, one.value, one.low, one.high)
                    for task in run.tasks
                    for metric, one in task.metrics.items()
                ]
                database.executemany("INSERT INTO metrics VALUES (?, ?, ?, ?, ?, ?)", rows)
        found = self._entries("WHERE digest = ? AND started = ?", (run.digest, run.started))
        return found[0]

    def runs(self, *, name: str | None = None, suite: str | None = None, limit: int = 50) -> list[Entry]:
        """The runs that were added last, the last first."""
        conditions = [(column, value) for column, value in (("name", name), ("suite", suite)) if value is not None]
        where = " AND ".join(f"{column} = ?" for column, _ in conditions)
        values = [value for _, value in conditions]
        return self._entries(f"WHERE {where or '1'} ORDER BY id DESC LIMIT ?", (*values, limit))

    def run(self, id: int) -> Entry:
        """One run by its number.

        Raises:
            UsageError: there is none.
        """
        found = self._entries("WHERE id = ?", (id,))
        if not found:
            raise UsageError(f"{self.folder}: no run {id} there.", hint="qconv eval history lists them.")
        return found[0]

    def baseline(self, name: str, suite_sha256: str) -> Entry | None:
        """Of what is followed under ``name``, on exactly that suite, the accepted run that was added last."""
        found = self._entries(
            "WHERE name = ? AND suite_sha256 = ? AND accepted ORDER BY id DESC LIMIT 1", (name, suite_sha256)
        )
        return found[0] if found else None

    def before(self, run: Run, name: str) -> Entry | None:
        """Of what is followed under ``name``, on a suite so called, the run that was added before this one."""
        here = "coalesce((SELECT id FROM runs WHERE digest = ? AND started = ?), 9223372036854775807)"
        where = f"WHERE name = ? AND suite = ? AND id < {here} ORDER BY id DESC LIMIT 1"
        found = self._entries(where, (name, run.suite, run.digest, run.started))
        return found[0] if found else None

    def accept(self, id: int, accepted: bool = True) -> None:
        """Let a run be the baseline of later ones, or no longer.

        Raises:
            UsageError: there is none of that number.
        """
        self.run(id)
        with _errors(self.folder / DATABASE_NAME), self._database as database:
            database.execute("UPDATE runs SET accepted = ? WHERE id = ?", (int(accepted), id))

    def trend(self, name: str, suite: str, task: str, metric: str, *, limit: int = 60) -> list[Point]:
        """One metric over the last runs of what is followed under ``name``, in the order in which they were added."""
        statement = """
            SELECT id, started, build_sha256, outcome, value, low, high
            FROM runs JOIN metrics ON metrics.run = runs.id
            WHERE name = ? AND suite = ? AND task = ? AND metric = ?
            ORDER BY id DESC LIMIT ?"""
        rows = self._rows(
            statement, (name, suite, task, metric, limit), (int, str, str, str, _NUMBER, _NUMBER, _NUMBER)
        )
        return [Point(*row) for row in reversed(rows)]

    def _entries(self, condition: str, values: tuple[object, ...]) -> list[Entry]:
        statement = f"SELECT id, name, accepted, record FROM runs {condition}"
        path = self.folder / DATABASE_NAME
        return [
            Entry(id, name, bool(accepted), parse_run(record, f"{path}, run {id}", _UNREADABLE))
            for id, name, accepted, record in self._rows(statement, values, (int, str, int, str))
        ]

    def _rows(self, statement: str, values: tuple[object, ...], types: Sequence[Any]) -> list[tuple[Any, ...]]:
        """What a statement finds; SQLite keeps values of any type in any column.

        Raises:
            ArtifactError: the database is damaged, or a value is of another type than qconv writes.
        """
        path = self.folder / DATABASE_NAME
        with _errors(path):
            rows: list[tuple[Any, ...]] = self._database.execute(statement, values).fetchall()
        for row in rows:
            if not all(isinstance(value, type) for value, type in zip(row, types, strict=True)):
                raise ArtifactError(f"{path}: holds a row that qconv did not write.", hint=_UNREADABLE)
        return rows


def files_of(run: Run) -> list[FileRef]:
    """Every file that a record names."""
    own = [] if run.build_report is None else [run.build_report]
    return [*own, *(file for task in run.tasks for file in task.files.values())]


def differences(before: Run, after: Run) -> list[str]:
    """What the two runs were made with that is not the same, in words; empty if only time passed."""
    parts = {
        "weights": (before.build.sha256, after.build.sha256),
        "recipe": (before.build.recipe_sha256, after.build.recipe_sha256),
        "tokenizer": (before.build.tokenizer_sha256, after.build.tokenizer_sha256),
        "reference": (_sha256(before), _sha256(after)),
        "suite": (before.suite_sha256, after.suite_sha256),
        "what was measured": ([one.name for one in before.tasks], [one.name for one in after.tasks]),
        "inputs": (_inputs(before, after), _inputs(after, before)),
        "qconv": (before.qconv, after.qconv),
    }
    found = [name for name, (one, other) in parts.items() if one != other]
    for what in ("engine", "versions", "device"):
        one, other = getattr(before, what), getattr(after, what)
        keys = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
        found += [f"{what}: {key} {one.get(key)} -> {other.get(key)}" for key in keys]
    return found


def _inputs(run: Run, other: Run) -> dict[str, str]:
    """Of the tasks that the other run has too."""
    return {task.name: task.inputs_sha256 for task in run.tasks if other.task(task.name) is not None}


def _sha256(run: Run) -> str | None:
    return None if run.reference is None else run.reference.sha256


def _prepare(path: Path, database: sqlite3.Connection) -> None:
    (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version not in (0, SCHEMA_VERSION):
        raise ArtifactError(
            f"{path}: is of version {version}, this qconv reads {SCHEMA_VERSION}.", hint="Use a newer qconv."
        )
    if version == 0 and tables:  # counted before the version is read: another process may be making them
        raise OutputError(f"{path}: is a database of something else.", hint="Choose another folder for the history.")
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA foreign_keys = ON")
    with database:
        database.execute("BEGIN IMMEDIATE")
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version == 0:  # and not begun by another process meanwhile
            for statement in _SCHEMA.split(";\n"):
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Turn SQLite's and the system's errors into ours."""
    try:
        yield
    except (sqlite3.Error, UnicodeError) as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF  # the low byte of an extended code
        if code in _BUSY:
            raise OutputError(f"{path}: {error}.", hint="Another process holds it: wait for that one.") from error
        if code in _UNUSABLE:
            raise OutputError(f"{path}: {error}.", hint="Is it writable, and the disk not full?") from error
        raise ArtifactError(f"{path}: is damaged: {error}.", hint="Restore it, or begin a new history.") from error
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}.", hint="Is it writable?") from error


def as_values(entry: Entry) -> dict[str, object]:
    """What a list of runs shows of one."""
    run = entry.run
    metrics = {task.name: {name: one.value for name, one in task.metrics.items()} for task in run.tasks}
    return {
        "id": entry.id,
        "name": entry.name,
        "started": run.started,
        "build": json.loads(run.build.model_dump_json(exclude={"report"})),
        "suite": run.suite,
        "outcome": run.verdict.outcome,
        "sentence": run.verdict.sentence,
        "accepted": entry.accepted,
        "metrics": metrics,
        "unmeasured": {one.name: one.sentence for one in run.unmeasured},
        "digest": run.digest,
    }
