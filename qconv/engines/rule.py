"""A rule about builds, and the verdict that an engine's rules come to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from typing import Literal, TypeAlias

from qconv.engines.subject import Deployment, Subject

Known: TypeAlias = Literal["run", "read", "thread"]
"""How something is known of an engine: a build was loaded there, its code was read, or threads say so."""
_SHOWN = 3


class Effect(StrEnum):
    """What comes of a build that breaks a rule."""

    WRONG = "loads and WRONG"
    REFUSED = "refused"
    NOTICE = "notice"


class Verdict(StrEnum):
    """What an engine makes of a build, as far as the rules know."""

    RIGHT = "loads and right"
    WRONG = "loads and WRONG"
    REFUSED = "refused"
    UNKNOWN = "unknown to the rules"


@dataclass(frozen=True, slots=True)
class Rule:
    """Something that a build must hold to for an engine.

    Attributes:
        key: ``engine/what``, unique.
        effect: What comes of breaking it.
        known: How it is known.
        source: Where: a file and version, or a thread.
        what: What the engine does with a build that breaks it, as a sentence without its end.
        remedy: What to do instead.
        breaches: What of a build breaks it, by name, one or none where the whole build does.
    """

    key: str
    effect: Effect
    known: Known
    source: str
    what: str
    remedy: str
    breaches: Callable[[Subject, Deployment], Iterable[str]]


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that a build breaks: where first, and in how many places; 1,000 stands for that many or more."""

    rule: Rule
    where: tuple[str, ...]
    count: int


@dataclass(frozen=True, slots=True)
class Engine:
    """What is known of an engine.

    Attributes:
        name: As ``--engine`` names it.
        version: Name and version that the rules are about.
        reads: How it is known that it reads a layout, by the layout's name (:attr:`Subject.layout`).
        rules: Its rules.
    """

    name: str
    version: str
    reads: Mapping[str, Known]
    rules: tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class Judgement:
    """An engine's verdict, with the rules that led to it."""

    engine: Engine
    verdict: Verdict
    known: Known | None
    findings: tuple[Finding, ...]


_MOST = 1000


def judge(engine: Engine, subject: Subject, deployment: Deployment) -> Judgement:
    """What an engine makes of a build: refused before WRONG, since what does not load computes nothing."""
    findings = []
    for rule in engine.rules:
        where = tuple(islice(rule.breaches(subject, deployment), _MOST))
        if where:
            findings.append(Finding(rule, where[:_SHOWN], len(where)))
    known = engine.reads.get(subject.layout)
    effects = {one.rule.effect for one in findings}
    if Effect.REFUSED in effects:
        verdict = Verdict.REFUSED
    elif Effect.WRONG in effects:
        verdict = Verdict.WRONG
    else:
        verdict = Verdict.UNKNOWN if known is None else Verdict.RIGHT
    order = {Effect.REFUSED: 0, Effect.WRONG: 1, Effect.NOTICE: 2}
    findings.sort(key=lambda one: order[one.rule.effect])
    return Judgement(engine, verdict, known, tuple(findings))
