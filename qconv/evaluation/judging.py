"""From measured tasks to gates that passed, failed or cannot tell.

A gate compares an estimate with a limit. Within it, it passes. Beyond it, it fails only if chance is ruled out: if the
p-value of "the truth is within the limit", adjusted by Holm's method over all gates of the run, is below alpha;
otherwise it is inconclusive, and so is a gate over fewer than ``least_units`` units. The least true excess that a gate
would have found with probability 0.8 is always told: a pass says no more than that.

Limits against the reference are absolute. Limits against the baseline (the last accepted build) are differences on the
same units, which is far more sensitive: what both builds have in common cancels. The noise floor is allowed on top.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qconv.evaluation.gates import GATED, PASS_AT_1, BuildClass, GateFile
from qconv.evaluation.metrics import column
from qconv.evaluation.record import Gate, Item, Run, Task, Unmeasured
from qconv.evaluation.statistics import (
    Floats,
    detectable_flips,
    detectable_mean,
    finite,
    holm,
    mcnemar_p,
    ratio_standard_error,
    upper_tail,
)

_COLUMNS = {"kld.mean": "kl", "top1.flips": "flips"}
"""Metrics that are one column per token."""


@dataclass(frozen=True, slots=True)
class Excess:
    """How far beyond its limit a metric is, as ``sum(y) / sum(x)`` over units, less ``offset``.

    Attributes:
        y: float64 [units].
        x: float64 [units].
        offset: What is taken off: the limit, where it was estimated on other units.
        offset_error: Its standard error.
    """

    y: Floats
    x: Floats
    offset: float = 0.0
    offset_error: float = 0.0

    @property
    def value(self) -> float:
        """Beyond the limit if positive."""
        return float(self.y.sum() / self.x.sum()) - self.offset

    @property
    def standard_error(self) -> float:
        """Of :attr:`value`."""
        return math.hypot(ratio_standard_error(self.y, self.x), self.offset_error)

    @property
    def p_value(self) -> float:
        """Of a true value of at most 0."""
        if not math.isfinite(self.value):
            return 0.0
        return upper_tail(self.value, self.standard_error, len(self.x))

    def detectable(self, alpha: float) -> float:
        """See :func:`~qconv.evaluation.statistics.detectable_mean`."""
        return detectable_mean(self.standard_error, len(self.x), alpha) if math.isfinite(self.value) else math.inf


def judge(
    tasks: Sequence[Task],
    build_class: BuildClass,
    gates: GateFile,
    baseline: Run | None = None,
    unmeasured: Sequence[Unmeasured] = (),
) -> tuple[Gate, ...]:
    """Every gate of the class on what the tasks are to measure, decided together; some may not have been measured."""
    found: list[Gate | None] = []
    for task in tasks:
        found += [_reference_gate(task, metric, limit, gates) for metric, limit in build_class.reference.items()]
        before = None if baseline is None else baseline.task(task.name)
        if before is not None:
            found += [
                _baseline_gate(task, before, metric, margin, gates) for metric, margin in build_class.baseline.items()
            ]
    for one in unmeasured:
        known = baseline is not None and baseline.task(one.name) is not None
        found += [_open_gate(one, metric, "reference", one.sentence) for metric in build_class.reference]
        found += [_open_gate(one, metric, "baseline", one.sentence) for metric in build_class.baseline if known]
    return _decided([gate for gate in found if gate is not None], gates)


def _open_gate(
    task: Task | Unmeasured, metric: str, against: Literal["reference", "baseline"], why: str
) -> Gate | None:
    """A gate on what is not known; None for what such a task does not measure anyway."""
    if metric not in GATED.get(task.kind, ()):
        return None
    name = _name(task, metric, against)
    told = f"{name} is not measured: {why}"
    return Gate(name=name, against=against, task=task.name, metric=metric, status="not measured", sentence=told)


def _name(task: Task | Unmeasured, metric: str, against: str) -> str:
    return f"{task.name}: {metric}" + (" against the baseline" if against == "baseline" else "")


def _reference_gate(task: Task, metric: str, limit: float, gates: GateFile) -> Gate | None:
    if metric == PASS_AT_1:
        judged = _pass_gate(task, task.reference_items, limit, gates, "reference")
        return judged or _open_gate(task, metric, "reference", "no problem's answers were judged.")
    measured = task.metrics.get(metric)
    if measured is None:
        return _open_gate(task, metric, "reference", "the engine tells no distributions.")
    tokens = column(task.items, "tokens")
    if metric == "ppl.ratio":
        y = column(task.items, "nll") - column(task.items, "reference_nll") - math.log(limit) * tokens
    else:
        y = column(task.items, _COLUMNS[metric]) - limit * tokens
    excess = Excess(y, tokens)
    return Gate(
        name=_name(task, metric, "reference"),
        against="reference",
        task=task.name,
        metric=metric,
        status="not measured",
        value=measured.value,
        low=measured.low,
        high=measured.high,
        limit=limit,
        noise=_noise(task, metric),
        units=len(task.items),
        exceeded=excess.value > 0.0,
        p_value=excess.p_value,
        detectable=_shown(excess.detectable(gates.alpha), metric),
        sentence="",
    )


def _baseline_gate(task: Task, before: Task, metric: str, margin: float, gates: GateFile) -> Gate | None:
    if metric == PASS_AT_1:
        return _pass_gate(task, before.items, margin, gates, "baseline")
    column_name = _COLUMNS.get(metric, "nll")
    if not all(item.values.keys() >= {column_name, "tokens"} for item in (*task.items, *before.items)):
        return None
    noise = _noise(task, metric) or 0.0
    factor, slack = (1.0, math.log1p(margin)) if metric == "ppl.ratio" else (1.0 + margin, noise)
    items, theirs = paired(task, before, gates.least_units)
    if items:
        x = column(items, "tokens")
        y = column(items, column_name) - factor * column(theirs, column_name) - slack * x
        excess = Excess(y, x)
        value, known = column(items, column_name).sum() / x.sum(), column(theirs, column_name).sum() / x.sum()
    else:
        items = task.items
        other, x = column(before.items, "tokens"), column(items, "tokens")
        known = float(column(before.items, column_name).sum() / other.sum())
        error = factor * ratio_standard_error(column(before.items, column_name), other)
        excess = Excess(column(items, column_name), x, factor * known + slack, error)
        value = column(items, column_name).sum() / x.sum()
    if metric == "ppl.ratio":
        value, known, limit = math.exp(min(value, 700.0)), math.exp(min(known, 700.0)), 1.0 + margin
        limit *= known
    else:
        limit = factor * known + slack
    return Gate(
        name=_name(task, metric, "baseline"),
        against="baseline",
        task=task.name,
        metric=metric,
        status="not measured",
        value=finite(float(value)),
        limit=finite(float(limit)),
        baseline=finite(float(known)),
        noise=_noise(task, metric),
        units=len(items),
        exceeded=excess.value > 0.0,
        p_value=excess.p_value,
        detectable=_shown(excess.detectable(gates.alpha), metric),
        sentence="",
    )


def paired(task: Task, before: Task, least: int) -> tuple[Sequence[Item], Sequence[Item]]:
    """The units that two measurements have in common, side by side; none if they are too few to go by.

    Other inputs can be paired by document, where a document is the same; their windows are different texts.
    """
    if task.inputs_sha256 != before.inputs_sha256 and (task.unit == "window" or before.unit == "window"):
        return (), ()
    theirs = {item.name: item for item in before.items}
    sizes = [name for name in ("tokens", "bytes", "samples") if all(name in item.values for item in task.items)]
    pairs = [
        (item, theirs[item.name])
        for item in task.items
        if item.name in theirs and all(item.values[one] == theirs[item.name].values.get(one) for one in sizes)
    ]
    if len(pairs) < min(least, len(task.items)):
        return (), ()
    return tuple(item for item, _ in pairs), tuple(item for _, item in pairs)


def _pass_gate(task: Task, other: Sequence[Item], limit: float, gates: GateFile, against: str) -> Gate | None:
    """The loss of pass@1 on the problems that both were given; McNemar's test where each has one completion."""
    theirs = {item.name: item for item in other if "passed" in item.values}
    items = [item for item in task.items if item.name in theirs and "passed" in item.values]
    if not items:
        return None
    ours = column(items, "passed") / column(items, "samples")
    known = np.array([theirs[item.name].values["passed"] / theirs[item.name].values["samples"] for item in items])
    loss = known - ours
    if np.all((loss == 0) | (np.abs(loss) == 1)):
        lost, gained = int((loss > 0).sum()), int((loss < 0).sum())
        p_value, detectable = mcnemar_p(lost, gained), detectable_flips(len(items), gained, gates.alpha)
    else:
        excess = Excess(loss, np.ones(len(items)))
        p_value, detectable = excess.p_value, excess.detectable(gates.alpha)
    value = float(loss.mean())
    return Gate.model_validate(
        {
            "name": _name(task, PASS_AT_1, against),
            "against": against,
            "task": task.name,
            "metric": PASS_AT_1,
            "status": "not measured",
            "value": float(ours.mean()),
            "limit": float(known.mean()) - limit,
            "baseline": float(known.mean()),
            "units": len(items),
            "exceeded": value > 0.0 and value >= limit,
            "p_value": p_value,
            "detectable": finite(detectable),
            "sentence": "",
        }
    )


def _decided(found: Sequence[Gate], gates: GateFile) -> tuple[Gate, ...]:
    """In order; gates without a p-value stay open, and no other gate's p-value is adjusted for them."""
    adjusted = iter(holm([gate.p_value for gate in found if gate.p_value is not None]))
    return tuple(
        gate if gate.p_value is None else gate.model_copy(update=_decision(gate, next(adjusted), gates))
        for gate in found
    )


def _decision(gate: Gate, p_value: float, gates: GateFile) -> dict[str, object]:
    told = f"{gate.name} is {_number(gate.value)}, its limit {_number(gate.limit)}"
    if gate.units is not None and gate.units < gates.least_units:
        status, why = "inconclusive", f"over only {gate.units} units"
    elif not gate.exceeded:
        status, why = "pass", f"a true excess of {_number(gate.detectable)} would probably have been found"
    elif p_value < gates.alpha:
        status, why = "fail", f"beyond chance (p = {p_value:.2g})"
    else:
        status, why = "inconclusive", f"which chance can explain (p = {p_value:.2g})"
    return {"status": status, "adjusted_p_value": p_value, "sentence": f"{told}: {why}"}


def _noise(task: Task, metric: str) -> float | None:
    found = task.metrics.get(f"noise.{metric}")
    return None if found is None else found.value


def _shown(excess: float, metric: str) -> float | None:
    """A detectable excess in the metric's own units: of a perplexity ratio as a relative growth."""
    return finite(math.expm1(min(excess, 700.0)) if metric == "ppl.ratio" else excess)


def _number(value: float | None) -> str:
    return "unbounded" if value is None else f"{value:.4g}"
