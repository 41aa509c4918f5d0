"""What the page, the Markdown and the JUnit file show of a run, made once: rows of text, charts, flipped problems."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qconv.evaluation.build_report import BuildReport, parse_report
from qconv.evaluation.history import History, differences
from qconv.evaluation.kept_files import load_json
from qconv.evaluation.record import Artifact, Run
from qconv.evaluation.report.charts import TrendPoint, trend
from qconv.evaluation.report.error_view import ErrorView, error_view
from qconv.evaluation.report.figures import NOTHING, Form, interval, limit, nbytes, number, scaled
from qconv.evaluation.report.gate_rows import GateRow, Own, gate_rows, verdict_line
from qconv.evaluation.report.parts import BlameRecord, blame_of
from qconv.evaluation.report.predicted import predicted
from qconv.evaluation.report.task_view import Chart, TaskView, own_words, task_view, value_of
from qconv.evaluation.report.words import Words, headlines, sign, words

_BLAMED = 8
NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class RunView:
    """A run.

    Attributes:
        run: The record.
        name: What its build is followed under.
        heading: Its name and how it was made.
        verdict: What its gates come to, in plain words.
        facts: Of what was run, names and values.
        gates: Its gates.
        tasks: Its tasks.
        trends: Charts over the runs before, and by task and metric the points of each.
        error: What the build's own report says; None where it has none.
        blame: What costs most: part, divergence, its layer without it.
        blame_baseline: What that is compared with.
        command: What reproduces the run.
        changes: What is not as in the run before.
        since: When that was.
        own: By task, what it calls its metrics.
    """

    run: Run
    name: str
    heading: str
    verdict: str
    facts: tuple[tuple[str, str], ...]
    gates: tuple[GateRow, ...]
    tasks: tuple[TaskView, ...]
    trends: tuple[Chart, ...]
    points: Mapping[tuple[str, str], Sequence[TrendPoint]]
    error: ErrorView | None
    blame: tuple[tuple[str, str, str], ...]
    blame_baseline: str | None
    command: str
    changes: tuple[str, ...] = field(default=())
    since: str | None = None
    own: Own = field(default_factory=dict)


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
    own = {task.name: own_words(folder, task) for task in run.tasks}
    points: dict[tuple[str, str], Sequence[TrendPoint]] = {}
    changes: tuple[str, ...] = ()
    since = None
    if history is not None:
        points = _points(history, followed, run)
        before = history.before(run, followed)
        if before is not None:
            changes, since = tuple(differences(before.run, run)), before.run.started
    report = _report_of(folder, run)
    expected = None if report is None else predicted(report, run)
    blame = blame_of(folder)
    gates = gate_rows(run, own)
    return RunView(
        run=run,
        name=followed,
        heading=f"{followed}: {described(run)}",
        verdict=verdict_line(run, gates),
        facts=(*_facts(run), *((("KL divergence", expected),) if expected is not None else ())),
        gates=gates,
        tasks=tuple(task_view(folder, task) for task in run.tasks),
        trends=tuple(_trends(points, run, own)),
        points=points,
        error=None if report is None else error_view(report),
        blame=() if blame is None else _blame(blame),
        blame_baseline=None if blame is None else blame.baseline,
        command=shlex.join(run.command),
        changes=changes,
        since=since,
        own=own,
    )


def told_apart(views: Sequence[RunView]) -> list[RunView]:
    """The same runs; builds of one name that are not the same build are named with the folder that they lie in."""
    builds: dict[str, set[str]] = {}
    for one in views:
        builds.setdefault(one.name, set()).add(one.run.build.sha256)
    return [one if len(builds[one.name]) == 1 else _renamed(one) for one in views]


def _renamed(one: RunView) -> RunView:
    name = f"{Path(one.run.build.path).parent.name}/{one.name}"
    return replace(one, name=name, heading=f"{name}: {described(one.run)}")


def summary(views: Sequence[RunView]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """One row for each run: head and rows of the table over several runs, in text."""
    columns = value_columns(views)
    tasks = {task for task, _ in columns}
    named = [(task, words_of(views, task, metric)) for task, metric in columns]
    names = [called.name + (f", {called.unit}" if called.unit else "") for _, called in named]
    if len(tasks) > 1:
        names = [f"{task}: {name}" for (task, _), name in zip(named, names, strict=True)]
    head = ("build", "size", "bits per weight", *names, "verdict")
    rows = []
    for one in views:
        cells = [one.name, size_of(one.run.build), number(one.run.build.bits_per_weight)]
        cells += [value_in(one, task, metric) for task, metric in columns]
        rows.append((*cells, sign(one.run.verdict.outcome)[1]))
    return head, rows


def value_columns(views: Sequence[RunView]) -> list[tuple[str, str]]:
    """Tasks and the metrics that stand for them, over all runs, in the order in which they come."""
    columns: list[tuple[str, str]] = []
    for one in views:
        for task in one.run.tasks:
            columns += [(task.name, metric) for metric in headlines(task)]
        for left in one.run.unmeasured:
            columns += [(left.name, metric) for metric in headlines(left)]
    return list(dict.fromkeys(columns))


def value_in(one: RunView, name: str, metric: str) -> str:
    """A metric of a run with its interval; says where it was not measured."""
    if any(left.name == name for left in one.run.unmeasured):
        return NOT_MEASURED
    task = one.run.task(name)
    return NOTHING if task is None else value_of(task.metrics.get(metric), metric, one.own.get(name, {}))


def words_of(views: Sequence[RunView], name: str, metric: str) -> Words:
    """What a task's metric is called in the first run that has it."""
    for one in views:
        task = one.run.task(name)
        if task is not None and metric in task.metrics:
            return words(metric, task.metrics[metric].unit, one.own.get(name, {}))
    return words(metric)


def size_of(build: Artifact) -> str:
    """Bytes of a build's weights, for people."""
    return NOTHING if build.size is None else nbytes(build.size)


def described(run: Run) -> str:
    """How a build was made, and what it is compared with."""
    made = run.build.format or {"model": "not quantized", "endpoint": "served"}.get(run.build.kind, run.build.kind)
    by = f" layout, rounded by {run.build.method}" if run.build.method else ""
    against = "" if run.reference is None else f", against {run.reference.name}"
    return f"{made}{by}{against}"


def _facts(run: Run) -> tuple[tuple[str, str], ...]:
    build = run.build
    facts: list[tuple[str, str | None]] = [
        ("build", build.path),
        ("weights sha256", build.sha256),
        ("recipe sha256", build.recipe_sha256),
        ("tokenizer sha256", build.tokenizer_sha256),
        ("bits per weight", None if build.bits_per_weight is None else f"{build.bits_per_weight:.3f} over all weights"),
        ("size", None if build.size is None else f"{nbytes(build.size)} ({build.size:,} bytes)"),
        ("reference", None if run.reference is None else run.reference.path),
        ("reference sha256", None if run.reference is None else run.reference.sha256),
        ("suite", f"{run.suite}, seed {run.seed}"),
        ("gates", None if run.gates_name is None else f"{run.gates_name}, class {run.build_class}"),
        ("baseline", run.baseline),
        ("engine", _pairs(run.engine)),
        ("device", _pairs(run.device)),
        ("versions", _pairs(run.versions)),
        ("started", f"{run.started}, {run.seconds:,.0f} s"),
    ]
    return tuple((name, value) for name, value in facts if value is not None)


def _pairs(values: dict[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _points(history: History, followed: str, run: Run) -> dict[tuple[str, str], Sequence[TrendPoint]]:
    """Earlier values of what stands for each task, the oldest first; only where there are any."""
    found: dict[tuple[str, str], Sequence[TrendPoint]] = {}
    for task in run.tasks:
        for metric in headlines(task):
            points = history.trend(followed, run.suite, task.name, metric)
            if len(points) > 1:
                found[task.name, metric] = [
                    TrendPoint(one.started[:10], one.value, one.low, one.high, one.outcome in ("regression", "corrupt"))
                    for one in points
                ]
    return found


def _trends(points: Mapping[tuple[str, str], Sequence[TrendPoint]], run: Run, own: Own) -> list[Chart]:
    charts = []
    for (name, metric), shown in points.items():
        task = run.task(name)
        assert task is not None, "points are of the run's tasks"
        bounds = [
            gate.limit for gate in run.gates if (gate.task, gate.metric, gate.against) == (name, metric, "reference")
        ]
        called = words(metric, task.metrics[metric].unit, own.get(name, {}))
        bound = bounds[0] if bounds else None
        svg = trend(
            [_scaled(point, called.form) for point in shown],
            None if bound is None else scaled(bound, called.form),
            unit=called.unit if called.form == "plain" else "%",
        )
        charts.append(Chart(f"{name}: {called.name}, the last {len(shown)} runs", svg, _course(shown, called)))
    return charts


def _scaled(point: TrendPoint, form: Form) -> TrendPoint:
    """A point in the numbers that are shown."""
    value, low, high = (None if one is None else scaled(one, form) for one in (point.value, point.low, point.high))
    return replace(point, value=value, low=low, high=high)


def _course(points: Sequence[TrendPoint], called: Words) -> str:
    """The last run beside the one before."""
    before, last = points[-2].value, points[-1].value
    if before is None or last is None:
        return ""
    told, _ = interval(before, before, last, called.form)
    unit = f" {called.unit}" if called.unit else ""
    return f"{told}{unit}, {limit(before, called.form)} before." if before != last else f"{told}{unit}, as before."


def _report_of(folder: Path, run: Run) -> BuildReport | None:
    file = run.build_report
    return None if file is None else parse_report(load_json(folder, file), f"{folder}: {file.name}")


def _blame(found: BlameRecord) -> tuple[tuple[str, str, str], ...]:
    """Layers, then parts: what each costs, and its layer without it."""
    whole = found.whole.model_copy(update={"part": "the whole build"})
    return tuple(
        (row.part, f"{number(row.kld)} ± {number(row.error)}", number(row.layer_without))
        for row in (whole, *found.layers[:_BLAMED], *found.parts[:_BLAMED])
    )
