"""Gates and verdicts in plain words: what was asked, what came out, what that says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qconv.evaluation.record import Gate, Run
from qconv.evaluation.report.figures import NOTHING, Form, interval, limit, number
from qconv.evaluation.report.words import Words, sign, words

Own = Mapping[str, Mapping[str, Words]]
"""By task, what it calls its own metrics."""


@dataclass(frozen=True, slots=True)
class GateRow:
    """A gate, for people.

    Attributes:
        gate: As it is recorded.
        status: A word that is a class of the page's style: ``pass``, ``fail``, ``unsure`` or ``open``.
        sign: A character for it.
        word: It in words.
        name: What is judged.
        where: On which task, and against what.
        meaning: What the number means.
        figure: What was measured.
        unit: Its unit.
        between: Its interval.
        limit: What is allowed.
        known: What the accepted run or the reference had, where that is what it is judged by.
        said: What follows from it.
    """

    gate: Gate
    status: str
    sign: str
    word: str
    name: str
    where: str
    meaning: str
    figure: str
    unit: str
    between: str
    limit: str
    known: str
    said: str

    @property
    def value(self) -> str:
        """What was measured, with its unit."""
        return f"{self.figure} {self.unit}" if self.unit and self.figure != NOTHING else self.figure

    @property
    def key(self) -> tuple[str | None, str, str]:
        """The same in every build that is judged by it."""
        return self.gate.task, self.gate.metric, self.gate.against


_EXACT = 1e-9
"""What is detected from here on is whatever is there."""
_STYLES = {"pass": "pass", "fail": "fail", "inconclusive": "unsure", "not measured": "open"}
_OUTCOMES = {"pass": "pass", "regression": "fail", "corrupt": "fail", "inconclusive": "unsure", "not gated": "open"}
_KNOWN = {"baseline": "accepted run", "reference": "reference", "limit": "known", "integrity": "known"}
_TITLES = {"regression": "Regression", "inconclusive": "Cannot tell", "corrupt": "Corrupt"}


def style_of(outcome: str) -> str:
    """The page's class for a verdict."""
    return _OUTCOMES.get(outcome, "open")


def gate_rows(run: Run, own: Own) -> tuple[GateRow, ...]:
    """Every gate of a run."""
    return tuple(_row(run, gate, own) for gate in run.gates)


def verdict_line(run: Run, rows: tuple[GateRow, ...]) -> str:
    """What a run's gates come to, in plain words; what failed is told with its figures."""
    outcome = run.verdict.outcome
    left_out = f" Not measured: {', '.join(one.name for one in run.unmeasured)}." if run.unmeasured else ""
    if outcome == "pass" and rows:
        passed = "the gate" if len(rows) == 1 else f"all {len(rows)} gates"
        return f"No regression: {passed} passed.{left_out}"
    wanted = {"regression": ("fail",), "inconclusive": ("unsure", "open")}.get(outcome, ())
    found = [row for row in rows if row.status in wanted]
    if not found:
        said = run.verdict.sentence
        return said[:1].upper() + said[1:]
    verb = "failed" if outcome == "regression" else "cannot tell"
    return f"{_TITLES[outcome]}: {len(found)} of {len(rows)} gates {verb}. {_told(found[0])}{left_out}"


def _told(row: GateRow) -> str:
    if row.value == NOTHING:
        return f"{row.name}, {row.where}: {row.said}" if row.where else f"{row.name}: {row.said}"
    return f"{row.name} ({row.where}) is {row.value}, the limit {row.limit}. {row.said}"


def _row(run: Run, gate: Gate, own: Own) -> GateRow:
    task = None if gate.task is None else run.task(gate.task)
    metric = None if task is None else task.metrics.get(gate.metric)
    known = gate.against == "baseline" and gate.metric == "ppl.ratio"  # of which the gate holds the perplexity itself
    if gate.against == "integrity":
        called = Words("Files are whole", "Checksums, names, shapes, and that every number is finite.")
    else:
        unit = "" if metric is None else metric.unit
        called = words("ppl" if known else gate.metric, unit, own.get(gate.task or "", {}))
    shown = None if gate.against == "integrity" else gate.value
    figure, between = interval(gate.low, gate.high, shown, called.form)
    mark, word = sign(gate.status)
    against = {"baseline": "against the accepted run", "reference": "", "limit": "", "integrity": ""}[gate.against]
    return GateRow(
        gate=gate,
        status=_STYLES[gate.status],
        sign=mark,
        word=word,
        name=called.name,
        where=", ".join(filter(None, (gate.task, against))),
        meaning=called.meaning,
        figure=figure,
        unit=called.unit,
        between=between,
        limit=NOTHING if gate.against == "integrity" else limit(gate.limit, called.form),
        known="" if gate.baseline is None else f"{_KNOWN[gate.against]}: {number(gate.baseline, called.form)}",
        said=_said(gate, called.form),
    )


def _said(gate: Gate, form: Form) -> str:
    """What a gate's outcome says, and how sure that is."""
    if gate.p_value is None:
        return gate.sentence
    chance = gate.p_value if gate.adjusted_p_value is None else gate.adjusted_p_value
    p_value = f"p = {number(chance)}" if chance >= 1e-6 else "p below 0.000001"
    if gate.status == "pass":
        least = number(gate.detectable, "plain" if form == "plain" else "share")
        told = "Nothing is known of what it would have missed."
        if gate.detectable is not None:
            told = f"{least} beyond the limit would probably have been found."
            if gate.detectable < _EXACT:
                told = "Any excess would probably have been found."
    elif gate.status == "fail":
        told = f"Chance does not explain it ({p_value})."
    elif gate.exceeded:
        told = f"Beyond the limit, which chance can explain ({p_value})."
    else:
        told = f"Measured over only {gate.units or 0:,} units, too few to judge by."
    if gate.noise:
        told += f" Arithmetic alone makes {number(gate.noise, form)} of it."
    return f"{told} Measured twice: {gate.sentence}." if gate.reruns else told
