"""What the page, the Markdown and the JUnit file show of a run, made once: rows of text, charts, flipped problems."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from markupsafe import Markup

from qconv.errors import ArtifactError
from qconv.evaluation.build_report import BuildReport, parse_report
from qconv.evaluation.gates import GATED
from qconv.evaluation.history import History, differences
from qconv.evaluation.kept_files import load_arrays, load_json
from qconv.evaluation.record import AGAIN, Gate, Metric, Run, Task
from qconv.evaluation.report.bits import BitsTable, bits_table, predicted
from qconv.evaluation.report.charts import TrendPoint, heat_map, histogram, trend
from qconv.evaluation.report.experts import expert_maps
from qconv.evaluation.report.parts import Answer, BlameRecord, Confidence, answers_of, blame_of, confidences_of

FOLLOWED = ("kld.mean", "ppl.ratio", "ppl", "top1.flips", "pass@1")
"""Metrics whose trend is shown, where they are measured."""
SUMMARY = ("ppl", "kld.mean", "top1.agreement", "pass@1")
"""Columns of the table over several runs."""
_BLAMED = 8
NOTHING = "-"
"""Where there is no number."""
NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart with what it shows."""

    title: str
    svg: Markup
    note: str = ""


@dataclass(frozen=True, slots=True)
class TaskView:
    """A task: its numbers, how its tokens' divergence is spread, and its flipped problems."""

    name: str
    kind: str
    summary: str
    metrics: tuple[tuple[str, str, str, str, str], ...]
    confidence: tuple[tuple[str, str, str, str], ...]
    chart: Chart | None
    flips: tuple[Flip, ...]


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
class RunView:
    """A run; ``name`` is what its build is followed under."""

    run: Run
    name: str
    heading: str
    facts: tuple[tuple[str, str], ...]
    gates: tuple[Gate, ...]
    tasks: tuple[TaskView, ...]
    charts: tuple[Chart, ...]
    worst: tuple[tuple[str, str], ...]
    bits: BitsTable | None
    blame: tuple[tuple[str, str, str], ...]
    blame_baseline: str | None
    command: str
    changes: tuple[str, ...] = field(default=())
    since: str | None = None


def view(folder: Path, run: Run, history: History | None = None, name: str | None = None) -> RunView:
    """Everything that is shown of a run.

    Args:
        folder: Where the record's files are.
        run: The record.
        history: Earlier runs, for trends; None for none.
        name: What the build is followed under there; its own name by default.

    Raises:
        ArtifactError: a file of the run is absent or damaged.
    """
    followed = run.build.name if name is None else name
    charts: list[Chart] = []
    changes: tuple[str, ...] = ()
    since = None
    if history is not None:
        charts += _trends(history, followed, run)
        before = history.before(run, followed)
        if before is not None:
            changes, since = tuple(differences(before.run, run)), before.run.started
    report = _report_of(folder, run)
    maps, worst = ([], ()) if report is None else _maps(report)
    expected = None if report is None else predicted(report, run)
    blame = blame_of(folder)
    return RunView(
        run=run,
        name=followed,
        heading=f"{followed}: {_described(run)}",
        facts=(*_facts(run), *((("KL divergence", expected),) if expected is not None else ())),
        gates=run.gates,
        tasks=tuple(_task(folder, task) for task in run.tasks),
        charts=(*charts, *maps),
        worst=worst,
        bits=None if report is None else bits_table(report),
        blame=() if blame is None else _blame(blame),
        blame_baseline=None if blame is None else blame.baseline,
        command=shlex.join(run.command),
        changes=changes,
        since=since,
    )


def summary(views: Sequence[RunView]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """One row for each run: head and rows of the table over several runs."""
    columns: list[tuple[str, str]] = []
    for one in views:
        for task in one.run.tasks:
            columns += [(task.name, metric) for metric in SUMMARY if metric in task.metrics]
        for left in one.run.unmeasured:
            columns += [(left.name, metric) for metric in SUMMARY if metric in GATED.get(left.kind, ())]
    columns = list(dict.fromkeys(columns))
    tasks = {task for task, _ in columns}
    names = [metric if len(tasks) == 1 else f"{task}: {metric}" for task, metric in columns]
    head = ("build", "bits per weight", *names, "verdict")
    rows = []
    for one in views:
        cells = [one.name, number(one.run.build.bits_per_weight)]
        for name, metric in columns:
            measured = one.run.task(name)
            left_out = any(left.name == name for left in one.run.unmeasured)
            found = None if measured is None else measured.metrics.get(metric)
            cells.append(NOT_MEASURED if left_out else _interval(found))
        rows.append((*cells, one.run.verdict.outcome))
    return head, rows


def number(value: float | None) -> str:
    """Four significant digits; a dash for none."""
    return NOTHING if value is None else f"{value:.4g}"


def _described(run: Run) -> str:
    made = run.build.format or run.build.kind
    by = f" by {run.build.method}" if run.build.method else ""
    against = "" if run.reference is None else f", against {run.reference.name}"
    return f"{made}{by}{against}"


def _facts(run: Run) -> tuple[tuple[str, str], ...]:
    build = run.build
    facts: list[tuple[str, str | None]] = [
        ("build", build.path),
        ("weights sha256", build.sha256),
        ("recipe sha256", build.recipe_sha256),
        ("tokenizer sha256", build.tokenizer_sha256),
        ("bits per weight", None if build.bits_per_weight is None else f"{build.bits_per_weight:.3f}"),
        ("size", None if build.size is None else f"{build.size / 1e9:.3f} GB"),
        ("reference", None if run.reference is None else run.reference.path),
        ("reference sha256", None if run.reference is None else run.reference.sha256),
        ("suite", f"{run.suite}, seed {run.seed}"),
        ("gates", None if run.gates_name is None else f"{run.gates_name}, class {run.build_class}"),
        ("baseline", run.baseline),
        ("engine", _pairs(run.engine)),
        ("device", _pairs(run.device)),
        ("versions", _pairs(run.versions)),
        ("started", f"{run.started}, {run.seconds:.0f} s"),
    ]
    facts += [(key.replace("_", " "), str(value)) for key, value in build.report.items() if value not in (None, 0, {})]
    return tuple((name, value) for name, value in facts if value is not None)


def _pairs(values: dict[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _task(folder: Path, task: Task) -> TaskView:
    rows = tuple(
        (name, _interval(one), one.unit, "" if one.units is None else f"{one.units:,}", one.note or "")
        for name, one in task.metrics.items()
    )
    return TaskView(
        name=task.name,
        kind=task.kind,
        summary=f"{len(task.items):,} {task.unit}s: {task.source}; {task.seconds:.0f} s",
        metrics=rows,
        confidence=tuple(map(_confidence_row, confidences_of(folder, task))),
        chart=_histogram(folder, task),
        flips=_flips(folder, task),
    )


def _confidence_row(row: Confidence) -> tuple[str, str, str, str]:
    return f"{row.low:g} to {row.high:g}", f"{row.tokens:,}", number(row.kld), number(row.flips)


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
    return Chart("KL divergence from the reference, token by token", svg, "Logarithmic across.")


def _trends(history: History, followed: str, run: Run) -> list[Chart]:
    charts = []
    for task in run.tasks:
        for metric in FOLLOWED:
            if metric not in task.metrics:
                continue
            points = history.trend(followed, run.suite, task.name, metric)
            if len(points) < 2:
                continue
            limits = [
                gate.limit
                for gate in run.gates
                if (gate.task, gate.metric, gate.against) == (task.name, metric, "reference")
            ]
            shown = [
                TrendPoint(one.started[:10], one.value, one.low, one.high, one.outcome in ("regression", "corrupt"))
                for one in points
            ]
            svg = trend(shown, limits[0] if limits else None, unit=task.metrics[metric].unit)
            charts.append(Chart(f"{task.name}: {metric}, the last {len(points)} runs", svg))
    return charts


def _report_of(folder: Path, run: Run) -> BuildReport | None:
    file = run.build_report
    return None if file is None else parse_report(load_json(folder, file), f"{folder}: {file.name}")


def _maps(report: BuildReport) -> tuple[list[Chart], tuple[tuple[str, str], ...]]:
    maps = expert_maps(report)
    if maps is None:
        return [], ()
    note = "Squared error over squared weights, in percent, the worst linear of each expert."
    charts = [Chart("Error of every expert's weights", heat_map(maps.error, rows="layer", columns="experts"), note)]
    if maps.tokens is not None:
        svg = heat_map(maps.tokens, rows="layer", columns="experts", log=True)
        charts.append(Chart("Calibration tokens of every expert", svg, "Shaded by their logarithm."))
    return charts, tuple((name, f"{error:.3g} %") for name, error in maps.worst)


def _blame(found: BlameRecord) -> tuple[tuple[str, str, str], ...]:
    """Layers, then parts: what each costs, and its layer without it."""
    whole = found.whole.model_copy(update={"part": "the whole build"})
    return tuple(
        (row.part, f"{number(row.kld)} +- {row.error:.1g}", number(row.layer_without))
        for row in (whole, *found.layers[:_BLAMED], *found.parts[:_BLAMED])
    )


def _interval(metric: Metric | None) -> str:
    if metric is None:
        return NOTHING
    told = number(metric.value)
    return told if metric.low is None else f"{told} ({number(metric.low)} to {number(metric.high)})"


def _flips(folder: Path, task: Task) -> tuple[Flip, ...]:
    file = task.files.get("answers")
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
