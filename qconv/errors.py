"""Every error that qconv raises on purpose, and the exit code that each one ends the command line with.

A message says what happened, where (file, tensor, layer, expert) and what to do about it; the remedy is kept apart in
``hint`` so that the command line can set it off and ``--json`` can carry it as a field.
"""

from __future__ import annotations


class QconvError(Exception):
    """Base of the tree: the work could not be done. ``exit_code`` is the process's exit code."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message


class UsageError(QconvError):
    """The request itself is wrong: an argument, a recipe key, a combination that cannot work."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe does not parse or does not fit the model; names the offending key."""


class ArtifactError(QconvError):
    """A file on disk is corrupt, incomplete or stale. The message names it."""

    exit_code = 5


class CheckpointError(ArtifactError):
    """A source checkpoint is not what its index, header or config.json says it is."""


class UnreadLayoutError(CheckpointError):
    """Weights are stored in a way that qconv does not read, sound or not; the message says in which."""

    exit_code = 2


class VerificationError(ArtifactError):
    """A finished build differs from its checksums or from its source."""


class StaleJournalError(ArtifactError):
    """The output folder belongs to a run with other weights, recipe, calibration data or versions."""


class OutputError(QconvError):
    """The output folder cannot be used or written: not ours, locked, disk full, read-only."""


class ResourceError(QconvError):
    """The machine lacks memory or disk for the planned work."""


class EngineError(QconvError):
    """An engine could not load or compute a model: an endpoint that is down, a worker that died, a shape it refuses."""


class SandboxError(QconvError):
    """Model-written code cannot be run safely here: no sandbox, or one that failed its own proof."""

    exit_code = 6


class UnmeasurableError(QconvError):
    """A task needs what is not here. A suite's other tasks are measured all the same; alone it ends the run."""


class NoSandboxError(UnmeasurableError, SandboxError):
    """No sandbox starts on this machine."""


class MissingPackageError(UnmeasurableError, UsageError):
    """An optional package that a task needs is not installed."""


class IncapableEngineError(UnmeasurableError, UsageError):
    """The engine cannot compute what a task needs: whole distributions, likelihoods, or new tokens."""


class UnscorableError(UnmeasurableError, EngineError):
    """A server does not say how probable a prompt's tokens are, or says what no model can give."""


class BackendError(QconvError):
    """A kernel cannot be compiled, loaded or launched on this machine."""


class Interrupted(QconvError):
    """SIGINT or SIGTERM arrived; what was committed stays and the same command resumes."""

    def __init__(self, signal_number: int, *, hint: str | None = None) -> None:
        super().__init__("interrupted", hint=hint)
        self.exit_code = 128 + signal_number
