"""Blame for a finished run: the same build, the same reference, the same text as were measured; kept beside the run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from qconv.artifacts.build import Build
from qconv.artifacts.layout import layout_of
from qconv.boundary.content import is_gguf
from qconv.checkpoint.reader import read_json
from qconv.core.architecture import Layer
from qconv.errors import ArtifactError, UsageError
from qconv.evaluation.artifacts import identify
from qconv.evaluation.blame import Blame, Suspect, find_blame
from qconv.evaluation.record import AGAIN, Artifact, Task, parse_as, read_run
from qconv.evaluation.suites import TextSettings
from qconv.evaluation.text import calibrated_on, windowed_text
from qconv.folders.journal import locked
from qconv.folders.ownership import ledger, own_folder, remove_claimed, require_free, write_own
from qconv.models.folding import Folds
from qconv.runtime.files import ModelFiles, open_files

BLAME_NAME = "blame.json"
SCRATCH_FOLDER = ".qconv-blame"
"""Within the run's folder, and not its work folder: whatever began there is not blame's to remove."""

Progress = Callable[[str, int, int], None]
Log = Callable[[str], None]


def blame_run(
    folder: Path,
    *,
    tokens: int,
    worst_layers: int,
    baseline: Path | None = None,
    device: str = "cpu",
    progress: Progress,
    log: Log,
) -> Blame:
    """Find what costs most in the build of a run; writes ``blame.json`` into its folder.

    Args:
        folder: The run's.
        tokens: At least so many are scored, in whole windows.
        worst_layers: So many layers are looked into.
        baseline: The folder of a run of a build of the same reference: costs are how much more than there.
        device: A torch device.
        progress: Told what is at work, how many steps of it are done, and how many there are.
        log: Told about steps.

    Raises:
        UsageError: the run has no reference, or no text task; the baseline has another reference.
        ArtifactError: the run is not finished; the build or reference is not what was measured any more.
        OutputError: the run's folder is in use, or has no room for activations.
    """
    run = read_run(folder)
    if run.reference is None:
        raise UsageError(f"{folder}: was measured without a reference.", hint="Measure it with --reference MODEL.")
    task = next((one for one in run.tasks if one.kind == "text"), None)
    if task is None:
        raise UsageError(f"{folder}: has no text task to blame by.", hint="Run a suite that has one.")
    if run.build.kind == "endpoint":
        raise UsageError(
            f"{folder}: is of an endpoint, whose weights are not here.", hint="Measure the files themselves."
        )
    before = None if baseline is None else read_run(baseline)
    if before is not None and (before.reference is None or before.reference.sha256 != run.reference.sha256):
        raise UsageError(f"{baseline}: has another reference than {folder}.", hint="Give a run beside the same model.")
    for artifact in (run.build, run.reference, *(() if before is None else (before.build,))):
        _require_unchanged(artifact)
    build, reference = Path(run.build.path), Path(run.reference.path)
    require_free(folder, [BLAME_NAME], ledger(folder) or {})
    sequences = _sequences(task, build, reference, run.seed, tokens)
    log(f"{run.build.name}: parts of it in {run.reference.name}, {sum(map(len, sequences)):,} tokens")
    with _scratch(folder) as scratch:
        found = find_blame(
            open_files(reference),
            suspect(build),
            sequences,
            scratch,
            baseline=None if before is None else suspect(Path(before.build.path)),
            worst_layers=worst_layers,
            device=device,
            progress=progress,
        )
    values = {"baseline": None if before is None else before.build.name, **found.as_values()}
    write_own(folder / BLAME_NAME, json.dumps(values, indent=1).encode() + b"\n")
    return found


@contextlib.contextmanager
def _scratch(run: Path) -> Iterator[Path]:
    """A folder for activations within the run's: a system's folder for temporary files may be memory.

    Raises:
        OutputError: another process works on the run, or its folder cannot be written.
    """
    with locked(run):
        folder = run / SCRATCH_FOLDER
        remove_claimed(folder)  # what was killed left it
        try:
            yield own_folder(folder)
        finally:
            remove_claimed(folder)


def suspect(path: Path) -> Suspect:
    """A build as blame takes it."""
    return Suspect(open_files(path), folds_of(path))


def folds_of(path: Path) -> Callable[[Layer], Folds]:
    """What a build folded into its layers; nothing for GGUF, and for builds that do not tell."""
    files: ModelFiles = open_files(path)
    if is_gguf(path) or layout_of(path, read_json(path / "config.json")).format is None:
        return lambda layer: Folds.none()
    build = Build.open(path)
    return lambda layer: Folds.of(files.architecture, layer, build.fold_scales(layer))


def _require_unchanged(artifact: Artifact) -> None:
    found = identify(Path(artifact.path))
    if found.sha256 != artifact.sha256:
        raise ArtifactError(
            f"{artifact.path}: is not what the run measured any more.", hint="Run the evaluation again."
        )


def _sequences(task: Task, build: Path, reference: Path, seed: int, tokens: int) -> list[torch.Tensor]:
    settings = parse_as(
        TextSettings, {**task.settings, "kind": "text"}, f"{task.name}: its settings are damaged", AGAIN
    )
    shorter = settings.model_copy(update={"tokens": min(tokens, settings.tokens)})
    text = windowed_text(shorter, reference, seed, exclude=calibrated_on(build, settings.corpus, reference))
    found: list[torch.Tensor] = []
    for window in text.windows:
        found.append(torch.tensor(window.ids, dtype=torch.int64))
        if sum(map(len, found)) >= tokens:
            break
    return found
