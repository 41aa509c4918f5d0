"""What a report takes from a run beyond plain numbers, checked: answers, blame, confidence, own tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from qconv.boundary.reading import read_json
from qconv.errors import ArtifactError
from qconv.evaluation.blaming import BLAME_NAME
from qconv.evaluation.kept_files import FILES_FOLDER, load_json
from qconv.evaluation.record import AGAIN, Count, FileRef, Task, parse_as


class _Read(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Side(_Read):
    """One of two answers to a problem."""

    status: str
    text: str
    tokens: tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...] = ()
    """Empty where an engine tells none."""


class Answer(_Read):
    """A problem, and what the build and its reference answered."""

    problem: str
    prompt: str
    build: Side | None = None
    reference: Side | None = None


class _Answers(_Read):
    answers: tuple[Answer, ...]


class Cost(_Read):
    """What a part of a build costs."""

    part: str
    kld: float
    error: float
    layer_without: float | None = None


class BlameRecord(_Read):
    """``blame.json``."""

    whole: Cost
    layers: tuple[Cost, ...]
    parts: tuple[Cost, ...]
    baseline: str | None = None


class Confidence(_Read):
    """Divergence over the tokens of which the reference is so sure."""

    low: float = Field(alias="from")
    high: float = Field(alias="to")
    tokens: Count
    kld: float | None = Field(alias="kld.mean")
    flips: float | None = Field(alias="top1.flips")


class _Confidences(_Read):
    rows: tuple[Confidence, ...]


class MetricWords(_Read):
    """What a task calls one of its metrics, for people."""

    name: str
    meaning: str = ""
    unit: str = ""


class DetailTable(_Read):
    """A table of a task's own: by position, by kind of token, of every difference."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | None, ...], ...]
    """Text, or numbers, as many as there are columns; null is no number."""
    note: str = ""

    @model_validator(mode="after")
    def _rows_fit(self) -> Self:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"a row of table {self.title!r} has other columns than its head")
        return self


class CurvePoint(_Read):
    """A value with its interval at a named place."""

    label: str
    value: float | None
    low: float | None = None
    high: float | None = None


class Curve(_Read):
    """A value from place to place: by position, by length."""

    title: str
    points: Annotated[tuple[CurvePoint, ...], Field(min_length=1)]
    unit: str = ""
    note: str = ""


class Presented(_Read):
    """How a task of any kind presents itself, in its ``details``: names of its metrics, tables and curves."""

    words: dict[str, MetricWords] = {}
    tables: tuple[DetailTable, ...] = ()
    curves: tuple[Curve, ...] = ()


def answers_of(folder: Path, file: FileRef) -> tuple[Answer, ...]:
    """The answers that a run's file holds.

    Raises:
        ArtifactError: it is absent or damaged, or holds something else.
    """
    values: JsonValue = load_json(folder, file)
    where = f"{folder / FILES_FOLDER / file.name}: holds no answers"
    return parse_as(_Answers, {"answers": values}, where, AGAIN).answers


def blame_of(folder: Path) -> BlameRecord | None:
    """What was found to cost most; None where nobody asked.

    Raises:
        ArtifactError: it is damaged.
    """
    path = folder / BLAME_NAME
    hint = f"Run qconv eval blame {folder} again."
    if not path.exists():
        return None
    return parse_as(BlameRecord, read_json(path, ArtifactError, hint=hint), f"{path}: is damaged", hint)


def confidences_of(folder: Path, task: Task) -> tuple[Confidence, ...]:
    """Divergence by the reference's confidence; empty where there is no reference.

    Raises:
        ArtifactError: the record holds something else there.
    """
    rows = task.details.get("by_confidence") or []
    where = f"{folder}: task {task.name}: by_confidence is damaged"
    return parse_as(_Confidences, {"rows": rows}, where, AGAIN).rows


def presented(where: str, task: Task) -> Presented:
    """What a task says of itself for people.

    Raises:
        ArtifactError: the record holds something else there.
    """
    told = {key: task.details[key] for key in ("words", "tables", "curves") if task.details.get(key) is not None}
    return parse_as(Presented, told, f"{where}: task {task.name}: its details are damaged", AGAIN)
