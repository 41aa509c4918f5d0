"""What can become of a candidate."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How judging one candidate ended. All but the last are the candidate's own doing."""

    PASS = "pass"
    FAIL = "fail"
    """A wrong value, an exception, no such function, or the end of its process."""
    TIMEOUT = "timeout"
    MEMORY = "out of memory"
    PROTOCOL = "protocol"
    """It wrote to the pipe itself, or closed it."""
    INFRASTRUCTURE = "infrastructure"
    """The sandbox did not start, or the check could not run. It says nothing about the candidate."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The status and, unless it passed, a sentence why; text that came from the candidate is made printable."""

    status: Status
    reason: str = ""


class CandidateFailed(Exception):
    """The candidate cannot go on; carries the verdict."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.verdict = Verdict(status, reason)


class SandboxFailed(Exception):
    """The sandbox is at fault before any code of the candidate ran; carries the reason."""
