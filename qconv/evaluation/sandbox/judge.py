"""Decides whether a candidate passes: the check runs here, only the candidate in the sandbox."""

from __future__ import annotations

import builtins
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

from qconv.evaluation.sandbox.candidate import Backend, Candidate, Running
from qconv.evaluation.sandbox.limits import Limits
from qconv.evaluation.sandbox.verdict import CandidateFailed, SandboxFailed, Status, Verdict

ATTEMPTS = 3
"""Starts of a sandbox before its failure is reported."""
_PAUSE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Check:
    """Trusted source that defines ``check(candidate)``, which raises AssertionError if the candidate is wrong.

    It is executed in this process: only a data set whose checksum is pinned may supply it.

    Attributes:
        source: Python. It may need helpers, and the reference solution under the entry point's name.
        entry_point: Name of the function that a candidate must define.
    """

    source: str
    entry_point: str


def judge(
    backend: Backend,
    check: Check,
    program: str,
    limits: Limits = Limits(),  # noqa: B008  frozen
    running: Running | None = None,
) -> Verdict:
    """Run ``check`` on the function that ``program`` defines.

    A sandbox that does not start is tried again; only ``infrastructure`` is ever its fault.
    """
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_SECONDS * attempt)
        try:
            with Candidate(backend, limits, running) as candidate:
                return _verdict(candidate, check, program)
        except SandboxFailed as failure:
            reason = str(failure)
    return Verdict(Status.INFRASTRUCTURE, reason)


def _verdict(candidate: Candidate, check: Check, program: str) -> Verdict:
    try:
        function = _check_function(check.source)
    except Exception as error:
        return Verdict(Status.INFRASTRUCTURE, f"the check cannot be executed: {type(error).__name__}: {error}")
    try:
        candidate.load(program, check.entry_point)
        function(candidate.call)
    except CandidateFailed as failure:
        return failure.verdict
    except AssertionError:
        return candidate.failure.verdict if candidate.failure else Verdict(Status.FAIL, "a wrong result")
    except Exception as error:
        # A result of another type than the check expects: str - float, len(None).
        if candidate.failure:
            return candidate.failure.verdict
        return Verdict(Status.FAIL, f"a result that the check cannot use: {type(error).__name__}")
    return candidate.failure.verdict if candidate.failure else Verdict(Status.PASS)


def _check_function(source: str) -> Callable[[Callable[..., object]], object]:
    namespace: dict[str, object] = {
        "__name__": "check",
        "__builtins__": vars(builtins) | {"__import__": _importer_with_seeded_random()},
    }
    exec(compile(source, "check.py", "exec", dont_inherit=True), namespace)
    function = namespace["check"]
    if not callable(function):
        raise TypeError("check is not a function")
    return function


def _importer_with_seeded_random() -> Callable[..., ModuleType]:
    """``__import__`` whose ``random`` always draws the same: a verdict must not change from night to night."""
    seeded = ModuleType("random")
    generator = random.Random(0)
    for name, value in vars(random).items():
        # The module's functions are methods of one generator that it hides.
        own = isinstance(getattr(value, "__self__", None), random.Random)
        setattr(seeded, name, getattr(generator, name) if own else value)

    def imported(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] = (),
        level: int = 0,
    ) -> ModuleType:
        return seeded if name == "random" else __import__(name, globals, locals, fromlist, level)

    return imported
