"""Whether a stored run still stands: the same files, suite, gates, reference and engine, and a build that is whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from qconv import __version__
from qconv.errors import UnmeasurableError
from qconv.evaluation.artifacts import identify
from qconv.evaluation.gates import load_gates
from qconv.evaluation.humaneval.dataset import load_problems
from qconv.evaluation.humaneval.settings import HumanEvalSettings
from qconv.evaluation.record import RUN_NAME, Artifact, Gate, Run, Unmeasured, read_run
from qconv.evaluation.run import Request, identified, integrity_gate, subjects_of
from qconv.evaluation.run_folder import remove_left
from qconv.evaluation.sandbox.backends import find_backend

Progress = Callable[[str, int, int], None]


def measured_before(request: Request, progress: Progress) -> Run | None:
    """The finished run in the request's folder, where it is what the request asks for.

    What is left of its work folder is removed.

    Raises:
        ArtifactError: the folder holds a damaged run.
        UsageError: gates or engine do not exist.
        CheckpointError: the build or the reference cannot be read.
        OutputError: the work folder is in use or cannot be removed.
    """
    if not (request.out / RUN_NAME).is_file():
        return None
    run = read_run(request.out)
    same = run.baseline == (None if request.baseline is None else request.baseline.digest)
    if not same or Standing(progress).reason(run, request) is not None:
        return None
    remove_left(request.out)
    return run


@dataclass(slots=True)
class Standing:
    """What builds and references hold now; each is read once, however many runs are asked about.

    Attributes:
        progress: Told how far the reading is.
    """

    progress: Progress
    _references: dict[Path, Artifact] = field(default_factory=dict)
    _builds: dict[tuple[Path, Path | None], tuple[Artifact, Gate | None]] = field(default_factory=dict)

    def reason(self, run: Run, request: Request) -> str | None:
        """Why a stored run is not what the request asks for now; None if it is.

        Raises:
            UsageError: gates or engine do not exist.
            CheckpointError: the build or the reference cannot be read any more.
        """
        reference = None if request.reference is None else self._reference(request.reference)
        build, integrity = self._build(request, reference)
        engine = dict(subjects_of(request, build, reference)[0].engine.identity)
        gates = None if request.gates is None else load_gates(request.gates).digest()
        parts = {
            "the build": (_content(run.build), _content(build)),
            "the reference": (_content(run.reference), _content(reference)),
            "the suite": (run.suite_sha256, request.suite.digest()),
            "what judges": (run.gates_sha256, gates),
            "the engine": (run.engine, engine),
            "qconv": (run.qconv, __version__),
        }
        changed = [name for name, (before, now) in parts.items() if before != now]
        if changed:
            return f"changed since: {', '.join(changed)}"
        before = next((gate for gate in run.gates if gate.against == "integrity"), None)
        if integrity is not None and (before is None or before.status != integrity.status):
            return f"the build is not what it was: {integrity.sentence}"
        left_out = [one.name for one in run.unmeasured if _measurable(one, run)]
        return f"{', '.join(left_out)} can be measured now" if left_out else None

    def _reference(self, path: Path) -> Artifact:
        if path not in self._references:
            self._references[path] = identify(path)
        return self._references[path]

    def _build(self, request: Request, reference: Artifact | None) -> tuple[Artifact, Gate | None]:
        key = request.build, request.reference
        if key not in self._builds:
            build = identified(request)
            checked = request.gates is not None and build.kind != "endpoint"
            self._builds[key] = build, integrity_gate(build, reference, self.progress) if checked else None
        return self._builds[key]


def _measurable(left_out: Unmeasured, run: Run) -> bool:
    """Whether a task is there now that was left out for want of something on the machine, not in the engine."""
    if left_out.kind != HumanEvalSettings().kind or run.engine.get("engine") == "stream":
        return False
    try:
        find_backend()
        load_problems()
    except UnmeasurableError:
        return False
    return True


def _content(artifact: Artifact | None) -> tuple[str | None, ...]:
    """What an artifact is, wherever it lies."""
    return () if artifact is None else (artifact.sha256, artifact.tokenizer_sha256, artifact.recipe_sha256)
