"""The first screen: what all runs come to, which build to take, divergence against size, and builds by gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from qconv.evaluation.record import Run
from qconv.evaluation.report.charts import sparkline
from qconv.evaluation.report.figures import NOTHING, interval, nbytes, number, plain_list
from qconv.evaluation.report.gate_rows import GateRow, style_of
from qconv.evaluation.report.sizes import Build, kld_by_size
from qconv.evaluation.report.task_view import Chart
from qconv.evaluation.report.view import (
    RunView,
    size_of,
    value_columns,
    value_in,
    words_of,
)
from qconv.evaluation.report.words import sign, words

_KLD = "kld.mean"
_ACROSS = 7
"""Columns beside a build's name that fit a page: more go on in a table below."""
_ORDER = ("corrupt", "regression", "inconclusive", "not gated", "pass")
"""From the worst to the best."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of the matrix.

    Attributes:
        text: What it says.
        notes: Smaller lines below.
        style: A class of the page: ``pass``, ``fail``, ``unsure``, ``open``, or none.
        sign: A character that says the style without its colour.
        target: Where on the page it is explained, empty for nowhere.
        spark: Its trend.
    """

    text: str
    notes: tuple[str, ...] = ()
    style: str = ""
    sign: str = ""
    target: str = ""
    spark: Markup = field(default_factory=Markup)


@dataclass(frozen=True, slots=True)
class Matrix:
    """Builds down; what was measured and judged across: of each column what it is, and in small letters of what."""

    head: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True)
class Overview:
    """The first screen.

    Attributes:
        style: The page's class for the worst verdict.
        sign: A character that says it.
        verdict: One sentence.
        advice: Which builds to look at first.
        charts: Divergence against size, for each text that several builds were measured on.
        matrices: Builds by what was measured and judged.
        absent: Builds without a run: name and why.
    """

    style: str
    sign: str
    verdict: str
    advice: tuple[str, ...]
    charts: tuple[Chart, ...]
    matrices: tuple[Matrix, ...]
    absent: tuple[tuple[str, str], ...]


def overview(views: Sequence[RunView], absent: Sequence[tuple[str, str]] = ()) -> Overview:
    """Of one run or several; ``absent`` are builds that could not be made or measured, and why."""
    worst = min((one.run.verdict.outcome for one in views), key=_ORDER.index)
    advice, charts = [], []
    for suite, name in dict.fromkeys((one.run.suite, task.name) for one in views for task in one.run.tasks):
        builds = [(one, found) for one in views if one.run.suite == suite and (found := _build(one, name)) is not None]
        shown = [build for one, build in builds if not _unquantized(one.run)]
        if len(shown) > 1:
            charts.append(Chart(f"{name}: divergence against size", kld_by_size(shown), _key(shown, builds)))
            advice += _advice(shown, name, builds[0][0].run)
    return Overview(
        style="unsure" if absent and worst in ("pass", "not gated") else style_of(worst),
        sign=sign("inconclusive" if absent and worst in ("pass", "not gated") else worst)[0],
        verdict=_verdict(views, worst, absent),
        advice=tuple(advice),
        charts=tuple(charts),
        matrices=tuple(_matrices(views)),
        absent=tuple(absent),
    )


def anchor(build: int, gate: int | None = None) -> str:
    """Where a build, or one of its gates, is explained."""
    return f"b{build + 1}" if gate is None else f"b{build + 1}g{gate + 1}"


def _verdict(views: Sequence[RunView], worst: str, absent: Sequence[tuple[str, str]]) -> str:
    left = f" {plain_list([name for name, _ in absent])} could not be measured." if absent else ""
    if len(views) == 1:
        return views[0].verdict + left
    of_worst = list(dict.fromkeys(one.name for one in views if one.run.verdict.outcome == worst))
    builds = len(dict.fromkeys(one.name for one in views))
    told = {
        "pass": f"No regression: all {builds} builds passed every gate.",
        "not gated": f"Measured, not judged by gates: {plain_list(of_worst)}.",
        "inconclusive": f"Cannot tell for {plain_list(of_worst)} ({len(of_worst)} of {builds} builds); none is worse.",
        "regression": f"Regression: {plain_list(of_worst)} ({len(of_worst)} of {builds} builds).",
        "corrupt": f"Corrupt: {plain_list(of_worst)} ({len(of_worst)} of {builds} builds).",
    }
    return told[worst] + left


def _unquantized(run: Run) -> bool:
    """Whether a build is the reference itself."""
    return run.reference is not None and run.build.sha256 == run.reference.sha256


def _build(one: RunView, name: str) -> Build | None:
    """A run's build in the chart of a task; None where its divergence or size is not known."""
    task, size = one.run.task(name), one.run.build.size
    metric = None if task is None else task.metrics.get(_KLD)
    if metric is None or metric.value is None or not size:
        return None
    limits = [
        gate.limit for gate in one.run.gates if (gate.task, gate.metric, gate.against) == (name, _KLD, "reference")
    ]
    return Build(
        name=one.name,
        size=float(size),
        kld=max(metric.value, 0.0),
        low=metric.low,
        high=metric.high,
        outcome=one.run.verdict.outcome,
        limit=limits[0] if limits else None,
        other=one.run.build_report is None,
    )


def _key(shown: Sequence[Build], builds: Sequence[tuple[RunView, Build]]) -> str:
    """What the marks mean, as far as there are such."""
    styles = {style_of(one.outcome) for one in shown} | {"other" for one in shown if one.other}
    named = [
        ("pass", "disc: passes"),
        ("fail", "triangle: fails"),
        ("unsure", "diamond: cannot tell"),
        ("open", "square: no gate"),
        ("other", "grey: made by another tool"),
    ]
    told = [said for style, said in named if style in styles]
    if any(one.low is not None for one in shown):
        told.append("line: 95 % interval")
    if any(one.limit is not None for one in shown):
        told.append("dashes: its limit, where near")
    reference = next((one.run.reference for one, _ in builds if one.run.reference is not None), None)
    if reference is not None and reference.size is not None:
        told.append(f"the reference has {nbytes(reference.size)}")
    said = "; ".join(told)
    return f"{said[:1].upper()}{said[1:]}."


def _advice(shown: Sequence[Build], name: str, run: Run) -> list[str]:
    """The nearest to the reference and the smallest, of those that nothing is held against."""
    good = [one for one in shown if one.outcome == "pass"]
    if not good:
        return [f"None of these builds passes its gates on {name}."] if run.gates else []
    nearest, smallest = min(good, key=lambda one: one.kld), min(good, key=lambda one: (one.size, one.kld))
    part = "" if run.reference is None or not run.reference.size else _part(smallest, run.reference.size)
    if nearest is smallest:
        return [
            f"{nearest.name} is the smallest that passes{part} and the nearest to the reference: {_figures(nearest)}."
        ]
    return [
        f"Nearest to the reference: {nearest.name}, {_figures(nearest)}.",
        f"Smallest that passes: {smallest.name}, {_figures(smallest)}{part}.",
    ]


def _figures(one: Build) -> str:
    return f"{number(one.kld)} nats a token at {nbytes(one.size)}"


def _part(one: Build, reference: float) -> str:
    return f" ({number(one.size / reference, 'share')} of the reference's size)"


def _matrices(views: Sequence[RunView]) -> list[Matrix]:
    """Sizes, gates, then what no gate judges; as many tables as the columns need."""
    sizes = [Cell(size_of(one.run.build), _bits(one)) for one in views]
    columns: list[tuple[tuple[str, str], list[Cell]]] = [(("size", "bits per weight"), sizes)]
    for key in dict.fromkeys(row.key for one in views for row in one.gates):
        found = next(row for one in views for row in one.gates if row.key == key)
        note = ", ".join(filter(None, (found.where, found.unit if found.gate.against == "reference" else "")))
        columns.append(((found.name, note), [_gate(index, one, key) for index, one in enumerate(views)]))
    several = len({name for name, _ in value_columns(views)}) > 1
    judged = {(gate.gate.task, gate.gate.metric) for one in views for gate in one.gates}
    for name, metric in value_columns(views):
        if (name, metric) not in judged:
            called = words_of(views, name, metric)
            note = ", ".join(filter(None, (name if several else "", called.unit)))
            columns.append(((called.name, note), [_value(one, name, metric) for one in views]))
    tables = []
    suites = len({one.run.suite for one in views}) > 1
    for start in range(0, len(columns), _ACROSS):
        part = columns[start : start + _ACROSS]
        rows = [(_name(index, one, suites), *(cells[index] for _, cells in part)) for index, one in enumerate(views)]
        tables.append(Matrix((("build", ""), *(called for called, _ in part)), tuple(rows)))
    return tables


def _name(index: int, one: RunView, suites: bool) -> Cell:
    mark, word = sign(one.run.verdict.outcome)
    note = f"{word}, {one.run.suite}" if suites else word
    return Cell(one.name, (note,), style_of(one.run.verdict.outcome), mark, anchor(index))


def _bits(one: RunView) -> tuple[str, ...]:
    bits = one.run.build.bits_per_weight
    return () if bits is None else (f"{bits:.2f}",)


def _value(one: RunView, name: str, metric: str) -> Cell:
    task = one.run.task(name)
    measured = None if task is None else task.metrics.get(metric)
    if measured is None:
        return Cell(value_in(one, name, metric))
    called = words(metric, measured.unit, one.own.get(name, {}))
    value, between = interval(measured.low, measured.high, measured.value, called.form)
    return Cell(value, () if between == NOTHING else (between,), spark=_spark(one, name, metric, called.name))


def _spark(one: RunView, name: str, metric: str, called: str) -> Markup:
    """How a metric went from run to run; nothing where there is but one."""
    points = one.points.get((name, metric), ())
    return sparkline(points, f"{called}, the last {len(points)} runs") if points else Markup()


def _gate(index: int, one: RunView, key: tuple[str | None, str, str]) -> Cell:
    for place, row in enumerate(one.gates):
        if row.key == key:
            return _gate_cell(one, row, anchor(index, place))
    return Cell(NOTHING)


def _gate_cell(one: RunView, row: GateRow, target: str) -> Cell:
    """The value beside its limit; of divergence, which the chart is about, interval and trend too."""
    told: list[str] = []
    spark = Markup()
    if row.gate.against == "reference" and row.gate.task is not None:
        told = [row.figure]
        if row.gate.metric == _KLD:
            told.append(row.between)
            spark = _spark(one, row.gate.task, row.gate.metric, row.name)
    return Cell(row.word, tuple(text for text in told if text != NOTHING), row.status, row.sign, target, spark)
