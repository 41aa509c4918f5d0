"""A program that tries to pass a check without solving the task, or to get out of the sandbox; how one is written."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from textwrap import dedent

from qconv.evaluation.sandbox.judge import Check
from qconv.evaluation.sandbox.limits import Limits
from qconv.evaluation.sandbox.verdict import Status

CHECK = Check(
    source=dedent("""
        def check(candidate):
            assert candidate(21) == 42
            assert candidate("ab") == "abab"
            assert candidate([1, 2]) == [1, 2, 1, 2]
            assert abs(candidate(0.25) - 0.5) < 1e-6
    """),
    entry_point="double",
)

FAIL, TIMEOUT, MEMORY, PROTOCOL = Status.FAIL, Status.TIMEOUT, Status.MEMORY, Status.PROTOCOL


LIMITS = Limits(cpu_seconds=1, wall_seconds=20.0)
"""No forgery needs longer to succeed, and some use all they get: those that are to end by a timeout."""
AMPLE = Limits(cpu_seconds=20, wall_seconds=60.0)
"""What all others get: a slow machine must not end them before they fail in their own way."""
IDLE = Limits(cpu_seconds=1, wall_seconds=1.5)


@dataclass(frozen=True, slots=True)
class Forgery:
    """A program, how judging it may end, and what it may use."""

    name: str
    program: str
    expected: frozenset[Status]
    limits: Limits = LIMITS


def program(name: str, source: str, *expected: Status) -> Forgery:
    """A forger: wrong values that are to be accepted, or none at all."""
    return Forgery(name, dedent(source), frozenset(expected or {FAIL}), _limits(expected))


def escape(name: str, action: str, *expected: Status, before: str = "") -> Forgery:
    """Right values once ``action`` worked."""
    lines = [*dedent(before).strip().splitlines(), "def double(x):"]
    lines += [f"    {line}" for line in [*dedent(action).strip().splitlines(), "return x * 2"]]
    return Forgery(name, "\n".join(lines) + "\n", frozenset(expected or {FAIL}), _limits(expected))


def _limits(expected: Collection[Status]) -> Limits:
    return LIMITS if TIMEOUT in expected else AMPLE
