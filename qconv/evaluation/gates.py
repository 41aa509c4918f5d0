"""Gates: the limits that a class of builds must keep, and what the gates of a run come to."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field, model_validator

from qconv.errors import UsageError
from qconv.evaluation.record import Artifact, Gate, Outcome, Status, Unmeasured, Verdict
from qconv.evaluation.suites import Section, load_settings

PASS_AT_1 = "pass@1"
_OF_TEXT = ("kld.mean", "ppl.ratio", "top1.flips")
GATED: Mapping[str, tuple[str, ...]] = {"text": _OF_TEXT, "humaneval": (PASS_AT_1,), "longcontext": _OF_TEXT}
"""What gates can be set on, by the kind of the task that measures it."""
METRICS = tuple(dict.fromkeys(metric for metrics in GATED.values() for metric in metrics))

Limits = dict[str, Annotated[float, Field(ge=0.0, le=1e6, allow_inf_nan=False)]]


class BuildClass(Section):
    """Gates of one class of builds."""

    name: str
    formats: tuple[str, ...] | None = None
    """Only builds of these formats; null: of any."""
    bits: tuple[float, float]
    """Bits per quantized weight, from (inclusive) and to (exclusive)."""
    reference: Limits = Field(default_factory=dict)
    """By metric: ``kld.mean`` in nats, ``ppl.ratio`` as a factor, ``top1.flips`` as a share, ``pass@1`` the loss as a
    share of the problems."""
    baseline: Limits = Field(default_factory=dict)
    """By metric, how much worse than the baseline: ``kld.mean`` and ``top1.flips`` relative to its own value,
    ``ppl.ratio`` as relative growth of perplexity, ``pass@1`` as a share of the problems."""

    @model_validator(mode="after")
    def _known_metrics(self) -> BuildClass:
        for metric in (*self.reference, *self.baseline):
            if metric not in METRICS:
                raise ValueError(f"there is no gate on {metric!r}; known are {', '.join(METRICS)}")
        if self.reference.get("ppl.ratio") == 0.0:
            raise ValueError("ppl.ratio is a factor and must be more than 0")
        return self

    @model_validator(mode="after")
    def _bits_are_a_range(self) -> BuildClass:
        if not self.bits[0] < self.bits[1]:
            raise ValueError(f"bits: from {self.bits[0]} to {self.bits[1]} there is nothing")
        return self

    def fits(self, build: Artifact) -> bool:
        """Whether a build is of this class."""
        bits = build.quantized_bits_per_weight or build.bits_per_weight
        if bits is None:
            bits = 16.0 if build.kind == "model" else math.inf
        return (self.formats is None or build.format in self.formats) and self.bits[0] <= bits < self.bits[1]


class GateFile(Section):
    """A file of gates: the first class that a build fits counts."""

    alpha: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.001
    least_units: Annotated[int, Field(strict=True, ge=2, le=10**9)] = 10
    classes: Annotated[tuple[BuildClass, ...], Field(min_length=1)]

    def digest(self) -> str:
        """sha256 of the gates' canonical JSON, hexadecimal."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def load_gates(source: str) -> GateFile:
    """Gates by packaged name or file path.

    Raises:
        UsageError: no such gates, or not well-formed; names file and key.
    """
    return load_settings(GateFile, "gates", source)


def class_of(gates: GateFile, build: Artifact) -> BuildClass:
    """The class that a build is judged by.

    Raises:
        UsageError: none fits.
    """
    for one in gates.classes:
        if one.fits(build):
            return one
    raise UsageError(
        f"no class of gates fits {build.name} ({build.format or build.kind}, "
        f"{build.quantized_bits_per_weight or build.bits_per_weight} bits per weight).",
        hint="Give gates that have one, or measure with --no-gate.",
    )


def verdict(gates: Sequence[Gate], unmeasured: Sequence[Unmeasured] = ()) -> Verdict:
    """What gates come to; what no gate asks for and was left out all the same is named."""
    by_status: dict[Status, list[Gate]] = {}
    for gate in gates:
        by_status.setdefault(gate.status, []).append(gate)
    failed = by_status.get("fail", [])
    corrupt = [gate for gate in failed if gate.against == "integrity"]
    open_ = [*by_status.get("inconclusive", []), *by_status.get("not measured", [])]
    outcome: Outcome
    if corrupt:
        outcome, sentence = "corrupt", f"corrupt: {corrupt[0].sentence}"
    elif failed:
        names = ", ".join(gate.name for gate in failed)
        outcome = "regression"
        sentence = f"regression: {len(failed)} of {len(gates)} gates failed ({names}). First: {failed[0].sentence}"
    elif open_:
        names = ", ".join(gate.name for gate in open_)
        outcome = "inconclusive"
        sentence = f"inconclusive: {len(open_)} of {len(gates)} gates cannot tell ({names}). First: {open_[0].sentence}"
    elif not gates:
        outcome, sentence = "not gated", f"measured, not gated{_left_out(unmeasured)}"
    else:
        outcome, sentence = "pass", f"no regression: all {len(gates)} gates passed{_left_out(unmeasured)}"
    return Verdict(outcome=outcome, sentence=sentence)


def _left_out(unmeasured: Sequence[Unmeasured]) -> str:
    return f"; not measured: {', '.join(one.name for one in unmeasured)}" if unmeasured else ""


def rerun_merged(first: Sequence[Gate], second: Sequence[Gate]) -> tuple[Gate, ...]:
    """Gates after failing ones were measured a second time: what failed once and passed once is inconclusive."""
    again = {gate.name: gate for gate in second}
    merged = []
    for gate in first:
        if gate.status != "fail" or gate.name not in again:
            merged.append(gate)
            continue
        repeated = again[gate.name]
        if repeated.status == "fail":
            merged.append(repeated.model_copy(update={"reruns": 1}))
        else:
            sentence = f"{gate.sentence}; measured again: {repeated.sentence}"
            merged.append(repeated.model_copy(update={"status": "inconclusive", "sentence": sentence, "reruns": 1}))
    return tuple(merged)
