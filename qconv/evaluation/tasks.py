"""Kinds of tasks, and what a task is given to measure with.

A kind is a module with ``SETTINGS``, the pydantic model of its section in a suite (with ``kind`` and ``name``), and
``measure(settings, bench)``, which returns the :class:`~qconv.evaluation.record.Task`. What makes a verdict possible is
in the task's ``items``: one for each document or problem, paired with another run's by name.

How it shows in reports is in the task, too; nothing there knows kinds. ``files["answers"]`` are answers side by side,
``files["tokens"]`` divergences a token. Metrics that gates are set on stand for the task, else the first that can be
better or worse. ``details["words"]`` names metrics for people, ``{metric: {"name", "meaning", "unit"}}``, and
``details["tables"]`` are tables of its own, ``[{"title", "columns", "rows", "note"}]``
(:class:`~qconv.evaluation.report.parts.Presented`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from qconv.errors import IncapableEngineError, UsageError
from qconv.evaluation.cache import Cache
from qconv.evaluation.engines.base import Engine
from qconv.evaluation.record import Artifact, Task
from qconv.evaluation.suites import NoiseSettings, Suite, parse_settings

KINDS: Mapping[str, str] = {
    "text": "qconv.evaluation.text_task",
    "humaneval": "qconv.evaluation.humaneval.task",
    "longcontext": "qconv.evaluation.longcontext.task",
}
"""Module of each kind."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and of how much."""
Log = Callable[[str], None]


@dataclass(slots=True)
class Subject:
    """A model that is measured: the build or its reference. Its engine is opened when it is first asked for.

    Attributes:
        path: Where it lies.
        artifact: What it is, with its hashes.
        open: Makes an engine; takes another dtype and rows for the noise floor, None for the suite's.
        open_rounded: Makes one that rounds inputs as engines do that compute in FP8; None where the engine is another
            program, which does as it does.
    """

    path: Path
    artifact: Artifact
    open: Callable[[str | None, int | None], Engine]
    open_rounded: Callable[[], Engine] | None = None
    _engine: Engine | None = field(default=None)

    @property
    def engine(self) -> Engine:
        """The engine, with the model loaded."""
        if self._engine is None:
            self._engine = self.open(None, None)
        return self._engine

    def close(self) -> None:
        """Free the engine; the next use opens another."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


@dataclass(frozen=True, slots=True)
class Bench:
    """What a task is measured with.

    Attributes:
        build: What is measured.
        reference: What it is measured against, None for nothing.
        model_dir: The folder whose tokenizer and chat template count: the reference's if there is one.
        cache: What is known of references from earlier runs, by content.
        folder: The run's folder, for files of the record.
        work: A folder of this task alone, kept until the run is finished: what lies there resumes an interrupted task.
        seed: The run's seed.
        noise: How the noise floor is measured, None not at all.
        progress: Told how far the work is; also the place where an interruption takes effect.
        log: Told what happens, one sentence each.
    """

    build: Subject
    reference: Subject | None
    model_dir: Path
    cache: Cache
    folder: Path
    work: Path
    seed: int
    noise: NoiseSettings | None
    progress: Progress
    log: Log

    def tokenizer_folder(self) -> Path:
        """``model_dir``, of which something is here.

        Raises:
            IncapableEngineError: the model is known to an endpoint alone, so that there is no tokenizer.
        """
        if self.build.artifact.kind == "endpoint" and not self.model_dir.exists():
            raise IncapableEngineError(
                f"{self.model_dir}: no such folder, so there is no tokenizer to make the endpoint's tokens with.",
                hint="Give the folder or Hub id of the model that is served as BUILD or as --reference.",
            )
        return self.model_dir


class Kind(Protocol):
    """A module of :data:`KINDS`."""

    SETTINGS: type[BaseModel]

    def measure(self, settings: Any, bench: Bench) -> Task: ...


def kind_of(name: object) -> Kind:
    """A kind's module.

    Raises:
        UsageError: no such kind.
    """
    if name not in KINDS:
        raise UsageError(f"a task of kind {name!r} is unknown.", hint=f"Choose one of {', '.join(KINDS)}.")
    module: Any = importlib.import_module(KINDS[str(name)])
    kind: Kind = module
    return kind


def settings_of(suite: Suite, where: str) -> list[tuple[Kind, Any]]:
    """Each task's kind and checked settings, in order.

    Raises:
        UsageError: an unknown kind or key; names task and key.
    """
    tasks = []
    for values in suite.tasks:
        kind = kind_of(values.get("kind"))
        tasks.append((kind, parse_settings(kind.SETTINGS, values, f"{where}, task {values['name']}")))
    return tasks
