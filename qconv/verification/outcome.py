"""What a verification came to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from qconv.errors import VerificationError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and of how much."""


@dataclass(slots=True)
class Verification:
    """The outcome.

    Attributes:
        checked: What was checked, as sentences.
        problems: What is wrong, as sentences; empty for a good build.
        snr_db: Signal to noise ratio of every quantized linear against the source, in decibels, by module name.
        notices: What a reader should know though it is no fault.
        not_checked: What could not be looked at, and so is neither good nor bad, as sentences.
    """

    checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    snr_db: dict[str, float] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)

    def raise_if_bad(self, path: Path) -> None:
        """Turn problems into an error.

        Raises:
            VerificationError: there are problems; names the first few.
        """
        if self.problems:
            more = f" (and {len(self.problems) - 3} more)" if len(self.problems) > 3 else ""
            raise VerificationError(
                f"{path}: the build is bad: {'; '.join(self.problems[:3])}{more}.",
                hint="Do not publish it; build it again.",
            )
