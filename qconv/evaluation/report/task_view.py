"""What is shown of a task, of whatever kind: its numbers in words, its tokens' divergence, what flipped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from qconv.errors import ArtifactError
from qconv.evaluation.kept_files import load_arrays
from qconv.evaluation.record import AGAIN, FileRef, Metric, Task
from qconv.evaluation.report.charts import TrendPoint, histogram, trend
from qconv.evaluation.report.figures import NOTHING, interval, number
from qconv.evaluation.report.parts import Answer, Confidence, answers_of, confidences_of, presented
from qconv.evaluation.report.words import Words, headlines, words


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart with what it shows."""

    title: str
    svg: Markup
    note: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table: its head, and rows of as many cells."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class MetricRow:
    """A metric, for people; ``first`` are those that stand for the task."""

    key: str
    name: str
    meaning: str
    value: str
    between: str
    first: bool


@dataclass(frozen=True, slots=True)
class Flip:
    """A problem that one of the two solves and the other does not.

    Attributes:
        problem: Its name.
        lost: Whether it is the build that fails.
        reference_status: What became of the reference's answer.
        build_status: What became of the build's.
        prompt: The prompt.
        common: What both answers begin with.
        reference_rest: How the reference's answer goes on from the first differing token.
        build_rest: How the build's does.
        token: The index of that token; None where the answers are the same.
    """

    problem: str
    lost: bool
    reference_status: str
    build_status: str
    prompt: str
    common: str
    reference_rest: str
    build_rest: str
    token: int | None


@dataclass(frozen=True, slots=True)
class TaskView:
    """A task."""

    name: str
    kind: str
    summary: str
    metrics: tuple[MetricRow, ...]
    notes: tuple[str, ...]
    tables: tuple[Table, ...]
    chart: Chart | None
    curves: tuple[Chart, ...]
    flips: tuple[Flip, ...]


def task_view(folder: Path, task: Task) -> TaskView:
    """A task with what its files hold.

    Raises:
        ArtifactError: a file or the record is damaged.
    """
    own = own_words(folder, task)
    first = headlines(task)
    names = list(dict.fromkeys((*first, *task.metrics)))
    return TaskView(
        name=task.name,
        kind=task.kind,
        summary=f"{len(task.items):,} {task.unit}s: {task.source}; {task.seconds:.0f} s",
        metrics=tuple(metric_row(name, task.metrics[name], own, name in first) for name in names),
        notes=tuple(
            dict.fromkeys(
                f"{words(name, one.unit, own).name}: {one.note}" for name, one in task.metrics.items() if one.note
            )
        ),
        tables=(*_by_confidence(folder, task), *_own_tables(folder, task)),
        chart=_histogram(folder, task),
        curves=tuple(_curves(folder, task)),
        flips=_flips(folder, task),
    )


def own_words(folder: Path, task: Task) -> Mapping[str, Words]:
    """What a task calls its own metrics.

    Raises:
        ArtifactError: the record is damaged there.
    """
    told = presented(str(folder), task).words
    return {name: Words(one.name, one.meaning, one.unit) for name, one in told.items()}


def metric_row(name: str, metric: Metric, own: Mapping[str, Words], first: bool) -> MetricRow:
    """One metric in words."""
    called = words(name, metric.unit, own)
    value, between = interval(metric.low, metric.high, metric.value, called.form)
    unit = f" {called.unit}" if called.unit and metric.value is not None else ""
    return MetricRow(name, called.name, called.meaning, value + unit, between, first)


def _by_confidence(folder: Path, task: Task) -> list[Table]:
    rows = tuple(map(_confidence_row, confidences_of(folder, task)))
    if not rows:
        return []
    head = ("the reference's largest probability", "tokens", "KL divergence, nats a token", "other top token")
    return [Table("By the reference's confidence", head, rows)]


def _confidence_row(row: Confidence) -> tuple[str, str, str, str]:
    return f"{row.low:g} to {row.high:g}", f"{row.tokens:,}", number(row.kld), number(row.flips, "share")


def _own_tables(folder: Path, task: Task) -> list[Table]:
    def told(cell: str | float | None) -> str:
        return cell if isinstance(cell, str) else number(cell)

    return [
        Table(one.title, one.columns, tuple(tuple(map(told, row)) for row in one.rows), one.note)
        for one in presented(str(folder), task).tables
    ]


def _histogram(folder: Path, task: Task) -> Chart | None:
    file = task.files.get("tokens")
    if file is None or "kld.mean" not in task.metrics:
        return None
    values = load_arrays(folder, file).get("kl")
    if values is None or values.dtype.kind != "f":
        raise ArtifactError(f"{folder}: {file.name} holds no divergence of tokens.", hint=AGAIN)
    marks = [
        (name.removeprefix("kld."), one.value)
        for name in ("kld.median", "kld.mean", "kld.p99", "kld.p99.9")
        if (one := task.metrics.get(name)) is not None and one.value
    ]
    noise = task.metrics.get("noise.kld.mean")
    if noise is not None and noise.value:
        marks.append(("noise", noise.value))
    svg = histogram(values, [(name, float(value)) for name, value in marks if value is not None], unit="nats")
    return Chart(f"{task.name}: KL divergence from the reference, token by token", svg, "Logarithmic across.")


def _curves(folder: Path, task: Task) -> Iterator[Chart]:
    for one in presented(str(folder), task).curves:
        points = [TrendPoint(point.label, point.value, point.low, point.high, bad=False) for point in one.points]
        yield Chart(f"{task.name}: {one.title}", trend(points, None, unit=one.unit), one.note)


def _flips(folder: Path, task: Task) -> tuple[Flip, ...]:
    file: FileRef | None = task.files.get("answers")
    answers = () if file is None else answers_of(folder, file)
    return tuple(flip for flip in map(_flip, answers) if flip is not None)


def _flip(answer: Answer) -> Flip | None:
    """The two answers from their first differing token on (or character, where an engine tells no tokens).

    None where both solve the problem, or neither does, or only one was asked.
    """
    one, other = answer.reference, answer.build
    if one is None or other is None or (one.status == "pass") == (other.status == "pass"):
        return None
    common = _common(one.text, other.text)
    tokens = [np.array(side.tokens, dtype=np.int64) for side in (one, other)]
    shared = min(map(len, tokens))
    differing = np.flatnonzero(tokens[0][:shared] != tokens[1][:shared])
    token = int(differing[0]) if len(differing) else (shared if len(tokens[0]) != len(tokens[1]) else None)
    return Flip(
        problem=answer.problem,
        lost=one.status == "pass",
        reference_status=one.status,
        build_status=other.status,
        prompt=answer.prompt,
        common=one.text[:common],
        reference_rest=one.text[common:],
        build_rest=other.text[common:],
        token=token,
    )


def _common(one: str, other: str) -> int:
    shorter = min(len(one), len(other))
    return next((index for index in range(shorter) if one[index] != other[index]), shorter)


def value_of(metric: Metric | None, name: str, own: Mapping[str, Words]) -> str:
    """A metric with its interval on one line, without its unit."""
    if metric is None:
        return NOTHING
    value, between = interval(metric.low, metric.high, metric.value, words(name, metric.unit, own).form)
    return value if between == NOTHING else f"{value} ({between})"
