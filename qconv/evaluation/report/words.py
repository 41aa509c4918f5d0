"""What metrics and gates are called for people: a name, a unit, and a line that says what the number means.

What a task measures beyond the table here it names itself (:class:`~qconv.evaluation.report.parts.Presented`); a name
that nobody explains is shown as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from qconv.evaluation.gates import GATED
from qconv.evaluation.record import Task, Unmeasured
from qconv.evaluation.report.figures import Form

HEADLINES = 2
"""Metrics of a task without gates that stand for it."""


@dataclass(frozen=True, slots=True)
class Words:
    """A metric, for people.

    Attributes:
        name: Plain.
        meaning: One line; empty where nobody said it.
        unit: What follows a number, empty for none.
        form: How its number is told.
    """

    name: str
    meaning: str = ""
    unit: str = ""
    form: Form = "plain"


_NATS = "nats a token"
_WORDS: Mapping[str, Words] = {
    "kld.mean": Words(
        "KL divergence",
        "How far the build's probabilities of the next token are from the reference's, on average. 0: the same.",
        _NATS,
    ),
    "kld.upper": Words("KL divergence, at most", "The engine tells only likely tokens: the truth is less.", _NATS),
    "kld.median": Words("KL divergence, median", "Half of the tokens differ by less.", _NATS),
    "kld.p99": Words("KL divergence, 99th percentile", "One token in 100 differs by more.", _NATS),
    "kld.p99.9": Words("KL divergence, 99.9th percentile", "One token in 1,000 differs by more.", _NATS),
    "kld.max": Words("KL divergence, largest", "Of the token that differs most.", _NATS),
    "ppl": Words("Perplexity", "Among how many equally likely tokens the build seems to choose. Less is better."),
    "bits_per_byte": Words(
        "Bits per byte", "Length of the text in the build's code: compares models with other tokenizers.", "bits"
    ),
    "ppl.ratio": Words(
        "Perplexity over the reference's", "How much less likely the build finds the same text.", form="factor"
    ),
    "top1.flips": Words(
        "Other top token", "Tokens where the build finds another token most probable than the reference.", form="share"
    ),
    "top1.agreement": Words(
        "Same top token", "Tokens where build and reference find the same token most probable.", form="share"
    ),
    "delta_p.rms": Words(
        "Change of the true token's probability", "Root mean square over all tokens, in points of probability.",
        form="share",
    ),
}  # fmt: skip
_PASS = re.compile(r"pass@(\d{1,6})")
_PREFIXES: Mapping[str, tuple[str, str]] = {
    "reference.": ("{}, of the reference", "The reference's own."),
    "noise.": ("Noise of: {}", "What other batch shapes and number types alone change. Less than this means nothing."),
    "rounded_inputs.": ("{}, inputs rounded", "With the inputs of linears rounded as engines that compute so do it."),
}
_SIGNS: Mapping[str, tuple[str, str]] = {
    "pass": ("✓", "pass"),
    "fail": ("✗", "fail"),
    "inconclusive": ("?", "cannot tell"),
    "not measured": ("○", "not measured"),
    "regression": ("✗", "regression"),
    "corrupt": ("✗", "corrupt"),
    "not gated": ("○", "not gated"),
}


def sign(status: str) -> tuple[str, str]:
    """A gate's status, or a verdict, as a sign and in words: never by a colour alone."""
    return _SIGNS.get(status, ("?", status))


def words(metric: str, unit: str = "", own: Mapping[str, Words] | None = None) -> Words:
    """What a metric is called.

    Args:
        metric: Its name in the record.
        unit: Its unit in the record.
        own: What its task calls its metrics.
    """
    if own is not None and metric in own:
        found = own[metric]
        return replace(found, form="share", unit="") if unit == "share" else found
    if metric in _WORDS:
        return _WORDS[metric]
    solved = _PASS.fullmatch(metric)
    if solved is not None:
        within = "at the first attempt" if solved[1] == "1" else f"within {solved[1]} attempts"
        return Words(f"Solved {within}", "Problems whose tests the answer passes.", form="share")
    for prefix, (name, meaning) in _PREFIXES.items():
        if metric.startswith(prefix):
            base = words(metric.removeprefix(prefix), unit, own)
            return replace(base, name=name.format(base.name), meaning=meaning)
    return (
        Words(metric.replace("_", " "), form="share") if unit == "share" else Words(metric.replace("_", " "), "", unit)
    )


def headlines(task: Task | Unmeasured) -> tuple[str, ...]:
    """The metrics that stand for a task: those that gates are set on, else the first that can be better or worse."""
    gated = GATED.get(task.kind, ())
    if isinstance(task, Unmeasured):
        return gated
    found = tuple(metric for metric in gated if metric in task.metrics)
    judged = [name for name, one in task.metrics.items() if one.better != "neither" and one.value is not None]
    return found or tuple(judged[:HEADLINES])
