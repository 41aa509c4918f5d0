"""What came of every sample, and the journal that keeps it while a run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TextIO

from pydantic import TypeAdapter

from qconv.checkpoint.writer import output_errors
from qconv.errors import ArtifactError
from qconv.evaluation.sandbox.verdict import Status
from qconv.folders.journal import require_same
from qconv.folders.ownership import claim, own_folder

JOURNAL_NAME = "humaneval.jsonl"


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer to one problem.

    Attributes:
        task_id: The problem.
        sample: Which of its samples.
        text: What the model wrote, up to the stop string; halves of surrogate pairs, which no file of text can hold, as
            escapes.
        tokens: Its token ids; empty where the engine does not tell them.
        finish: Whether a stop ended it, or its length.
        status: What became of it.
        reason: Why, unless it passed.
    """

    task_id: str
    sample: int
    text: str
    tokens: tuple[int, ...]
    finish: Literal["stop", "length"]
    status: Status
    reason: str

    @property
    def judged(self) -> bool:
        """Whether the status says anything about the model."""
        return self.status is not Status.INFRASTRUCTURE

    @classmethod
    def of(cls, values: Mapping[str, object]) -> Sample:
        """From a journal's line. Journals of earlier versions may hold halves of surrogate pairs.

        Raises:
            ValueError: a field is missing, unknown, or of another type.
        """
        return _SAMPLE.validate_python({key: _storable(value) for key, value in values.items()}, extra="forbid")


_SAMPLE = TypeAdapter(Sample)


def _storable(value: object) -> object:
    return storable(value) if isinstance(value, str) else value


def storable(text: str) -> str:
    """The text with halves of surrogate pairs as escapes."""
    return text.encode(errors="backslashreplace").decode()


class Journal:
    """Samples of an unfinished run, one line of JSON each, after a line that says of what run. A context manager.

    A line that a kill cut short is dropped. Samples that were never judged are not kept, so they are tried again.
    """

    def __init__(self, folder: Path, key: Mapping[str, str]) -> None:
        """Open the journal of a run, or begin it.

        Raises:
            StaleJournalError: it is another run's; names what differs.
            ArtifactError: a line is not what qconv writes.
            OutputError: it cannot be read or written.
        """
        path = folder / JOURNAL_NAME
        self.samples: dict[tuple[str, int], Sample] = {}
        claim(own_folder(folder) / JOURNAL_NAME)
        with output_errors(path):
            if path.exists() and not path.is_file():
                raise ArtifactError(f"{path}: is no file.", hint="Remove it.")
            text = path.read_bytes() if path.exists() else b""
            whole = text[: text.rfind(b"\n") + 1]
            lines = [_fields(path, number, line) for number, line in enumerate(whole.splitlines(), start=1)]
            if lines:
                require_same(folder, {name: str(value) for name, value in lines[0].items()}, key)
            for number, fields in enumerate(lines[1:], start=2):
                try:
                    sample = Sample.of(fields)
                except ValueError as error:
                    raise _damaged(path, number) from error
                self.samples[sample.task_id, sample.sample] = sample
            self._file: TextIO = path.open("r+" if text else "w", encoding="utf-8")
            self._file.seek(len(whole))
            self._file.truncate()
            if not lines:
                self._write(json.dumps(dict(key)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, sample: Sample) -> None:
        """Keep a judged sample; what is not judged is known to this run only.

        Raises:
            OutputError: it cannot be written.
        """
        self.samples[sample.task_id, sample.sample] = sample
        if sample.judged:
            with output_errors(Path(self._file.name)):
                self._write(json.dumps(asdict(sample)))

    def _write(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _fields(path: Path, number: int, line: bytes) -> dict[str, object]:
    """A line's fields; strings may hold halves of surrogate pairs, which ``qconv.boundary.reading`` refuses."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, number) from error
    if not isinstance(fields, dict):
        raise _damaged(path, number)
    return fields


def _damaged(path: Path, number: int) -> ArtifactError:
    return ArtifactError(
        f"{path}: line {number} is not what qconv writes.",
        hint="Remove the file to let every problem be answered anew.",
    )
