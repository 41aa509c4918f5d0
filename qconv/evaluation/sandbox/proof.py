"""A sandbox proves itself before it is used: what is right passes, what forges or escapes does not."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qconv.errors import SandboxError
from qconv.evaluation.sandbox.candidate import Backend
from qconv.evaluation.sandbox.forgeries import FORGERIES, HONEST
from qconv.evaluation.sandbox.forgery import CHECK
from qconv.evaluation.sandbox.judge import Check
from qconv.evaluation.sandbox.limits import Limits
from qconv.evaluation.sandbox.pool import JudgePool
from qconv.evaluation.sandbox.verdict import Status, Verdict

WORKERS = 4
"""Candidates at once: some forgeries sleep until their time is up."""


@dataclass(frozen=True, slots=True)
class Solution:
    """A program that is known to be right, with the check that must say so."""

    name: str
    program: str
    check: Check


@dataclass(frozen=True, slots=True)
class Proof:
    """What was tried, all with the right outcome."""

    backend: str
    solutions: int
    forgeries: int
    seconds: float


def prove(
    backend: Backend,
    solutions: Sequence[Solution],
    limits: Limits,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Proof:
    """Try every forgery, every honest program and every solution.

    Args:
        backend: What makes the sandboxes.
        solutions: Reference solutions; they run under ``limits``, as candidates will.
        limits: Of the run that is to follow.
        progress: Told (what, done, total).

    Raises:
        SandboxError: one of them ended otherwise than it must; names it.
    """
    began = time.monotonic()
    right = [Solution(f"honest program '{item.name}'", item.program, CHECK) for item in HONEST] + list(solutions)
    total = len(FORGERIES) + len(right)
    done = 0
    with JudgePool(backend, WORKERS) as pool:
        # The corpus ends with those that use up their time; first in the queue, they run beside the others.
        forged = [pool.submit(CHECK, item.program, item.limits) for item in reversed(FORGERIES)]
        solved = [pool.submit(item.check, item.program, limits) for item in right]
        for forgery, future in zip(reversed(FORGERIES), forged, strict=True):
            verdict = future.result()
            if verdict.status in (Status.PASS, Status.INFRASTRUCTURE):
                raise _failed(backend, f"the forgery '{forgery.name}'", verdict)
            progress("proving the sandbox", done := done + 1, total)
        for solution, future in zip(right, solved, strict=True):
            verdict = future.result()
            if verdict.status is not Status.PASS:
                raise _failed(backend, f"{solution.name}, which is right,", verdict)
            progress("proving the sandbox", done := done + 1, total)
    return Proof(backend.name, len(right), len(FORGERIES), time.monotonic() - began)


def _failed(backend: Backend, what: str, verdict: Verdict) -> SandboxError:
    if verdict.status is Status.INFRASTRUCTURE:
        return SandboxError(
            f"{backend.name} does not work here: {verdict.reason}",
            hint="Allow unprivileged user namespaces (a container's seccomp and AppArmor profiles forbid them).",
        )
    reason = f" ({verdict.reason})" if verdict.reason else ""
    return SandboxError(
        f"{backend.name} failed its proof: {what} ended with '{verdict.status}'{reason}.",
        hint="No model-written code was run. Report this with the versions of kernel and sandbox.",
    )
