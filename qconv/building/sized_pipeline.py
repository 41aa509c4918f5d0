"""A build of a size: grids are chosen by what the model's output cares about, then the build is made.

The choice is kept in a journal of its own within the work folder, so that a run goes on with the one that it made.
Until then that folder holds the activations and gradients of the sensitivity's pass, layer by layer. What the build
belongs to is the request and not the recipe that comes of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qconv.artifacts.reported import read_report
from qconv.artifacts.source import Source
from qconv.building.chosen import ALLOCATION, Chosen, predicted_words
from qconv.building.gguf_pipeline import gguf_target
from qconv.building.gguf_target import GgufTarget
from qconv.building.inputs import ARITHMETIC, on_devices
from qconv.building.output import Outcome, begin, enter
from qconv.building.pipeline import open_source, safetensors_target
from qconv.building.run import make_builds
from qconv.building.safetensors_target import SafetensorsTarget
from qconv.building.sensitivity_pipeline import sweep, sweep_fingerprints
from qconv.building.target import Log
from qconv.calibration.corpus import TokenSet, build_tokens
from qconv.checkpoint.writer import TEMPORARY_SUFFIX, output_errors, sha256_of
from qconv.core.devices import Lending, devices_of
from qconv.core.workers import Workers
from qconv.executors import DEFAULT, get_executor
from qconv.folders.journal import JOURNAL_NAME, WORK_FOLDER, Journal, locked, require_same
from qconv.folders.ownership import remove_claimed
from qconv.folders.state import REPORT_NAME, FolderState
from qconv.planning.gguf_recipe import GgufRecipe, parse_gguf_recipe
from qconv.planning.recipe import parse_recipe
from qconv.sensitivity.allocating import Request, allocate, read_sensitivity, require_reachable, sensitivity_file
from qconv.sensitivity.palette import Palette
from qconv.sensitivity.palettes import AnyRecipe, palette_of, text_of
from qconv.sensitivity.sweep import scratch_bytes
from qconv.verification.outcome import Progress

_FOLDER = "sensitivity"
"""Within the work folder."""


def quantize_to_size(
    model: Path,
    out: Path,
    recipe: AnyRecipe,
    request: Request,
    *,
    sensitivity: Path | None = None,
    restart: bool = False,
    threads: int | None = None,
    executor: str = DEFAULT,
    devices: str = "cpu",
    progress: Progress,
    log: Log,
) -> Outcome:
    """Choose grids for a size and make the build, or continue.

    Args:
        model: The source checkpoint's folder.
        out: The build's folder; made if absent.
        recipe: What the build is to be besides, with text: :func:`qconv.sensitivity.palettes.calibrated`.
        request: What grids are chosen for.
        sensitivity: What ``qconv sensitivity`` made; None to measure it here, on the recipe's text.
        restart: Discard what ``out`` holds, if qconv made all of it.
        threads: Experts and matrices worked on at once; the bytes do not depend on it.
        executor: Where the work runs, by name: a module of :mod:`qconv.executors`.
        devices: On what tensors are computed that are added up; see :func:`qconv.core.devices.devices_of`.
        progress: Told what is at work, how much of it is done and how much there is.
        log: Told about decisions, one sentence each.

    Raises:
        UsageError, RecipeError: the request cannot work.
        CheckpointError: the source is damaged, or the sensitivity another model's.
        StaleJournalError: ``out`` belongs to a run with other inputs.
        OutputError: ``out`` is foreign, in use, or cannot be written.
        VerificationError: what was written does not stand for the source.
    """
    source = open_source(model, out, log)
    palette = palette_of(source, recipe, request.excluded)
    smallest = palette.recipe_for(require_reachable(palette, request.target))
    file = None if sensitivity is None else sensitivity_file(sensitivity)
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out), get_executor(executor)(threads, math.inf, Lending()) as workers:
        state = enter(out)
        tokens = build_tokens(text_of(recipe), source.checkpoint.path)
        by = tokens.digest if file is None else sha256_of(file)
        chosen = Chosen(request.digest(recipe.digest()), by)
        # Whatever is chosen: the recipe's own grid may not fit the model, the smallest ones do.
        any_choice = dataclasses.replace(_target(source, smallest, out, lambda _: None), chosen=chosen)
        belongs = any_choice.fingerprints(None if any_choice.calibration is None else tokens)
        belongs = on_devices(belongs, devices_of(devices))
        if state is FolderState.COMPLETE and not restart:
            made: Mapping[str, Any] = read_report(out)
            require_same(out, made["fingerprints"], belongs, ignored=[ARITHMETIC])
        else:
            choosing = _Choosing(source, recipe, request, file, tokens, out)
            begin(out, belongs, [REPORT_NAME], choosing.needed, restart=restart)
            made = choosing.run(workers, progress, log)
    chosen = dataclasses.replace(chosen, values=made[ALLOCATION])
    parse = parse_gguf_recipe if isinstance(recipe, GgufRecipe) else parse_recipe
    target = dataclasses.replace(_target(source, parse(made["recipe"]), out, log), chosen=chosen)
    return make_builds(
        source,
        [target],
        out,
        restart=False,
        threads=threads,
        executor=executor,
        devices=devices,
        progress=progress,
        log=log,
    )[0]


def _target(source: Source, recipe: AnyRecipe, out: Path, log: Log) -> GgufTarget | SafetensorsTarget:
    if isinstance(recipe, GgufRecipe):
        return gguf_target(source, recipe, out, "", log)
    return safetensors_target(source, recipe, out, "", log)


@dataclasses.dataclass(frozen=True, slots=True)
class _Choosing:
    """The choice of grids, made once for a run.

    Attributes:
        file: Of the sensitivity, where one is given.
        tokens: On which it is measured where none is.
        out: The run's folder.
    """

    source: Source
    recipe: AnyRecipe
    request: Request
    file: Path | None
    tokens: TokenSet
    out: Path

    @property
    def folder(self) -> Path:
        """Of the choice's journal, and of what the pass over the model keeps."""
        return self.out / WORK_FOLDER / _FOLDER

    def needed(self, committed: Collection[str]) -> int:
        """Bytes of disk that the pass still needs."""
        if self.file is not None or self._kept() is not None:
            return 0
        present = sum(file.stat().st_size for file in self.folder.glob("*.bin"))
        needed = scratch_bytes(self.source.architecture, self.tokens.ids.numel(), self.request.gradients)
        return max(0, needed - present)

    def run(self, workers: Workers, progress: Progress, log: Log) -> Mapping[str, Any]:
        """The recipe, and what the report says of the choice; as they were kept, if they were."""
        found = self._kept()
        if found is None:
            journal = self._journal()
            found = self._choose(journal, workers, progress, log)
            journal.commit(ALLOCATION, found)
        remove_claimed(self.folder, (".bin", ".safetensors", TEMPORARY_SUFFIX))
        return found

    def _kept(self) -> Mapping[str, Any] | None:
        journal = Journal.load(self.folder / JOURNAL_NAME)
        return None if journal is None else journal.units.get(ALLOCATION)

    def _journal(self) -> Journal:
        """Of the pass, which may be begun; of the choice alone where there is none."""
        belongs = sweep_fingerprints(self.source, text_of(self.recipe), self.tokens, self.request.gradients)
        journal = Journal.load(self.folder / JOURNAL_NAME)
        if journal is None:
            return Journal.create(self.folder / JOURNAL_NAME, belongs)
        journal.require(belongs)
        return journal

    def _choose(self, journal: Journal, workers: Workers, progress: Progress, log: Log) -> Mapping[str, Any]:
        request, text = self.request, text_of(self.recipe)
        if self.file is None:
            by = f"sensitivity on {self.tokens.ids.numel():,} tokens of {self.tokens.source}"
            log(f"{by}{'' if request.gradients else ', without gradients'}")
            statistics = sweep(self.source, text, self.tokens, journal, workers, progress, request.gradients)
        else:
            by, statistics = "a given sensitivity", read_sensitivity(self.file)
        progress("choosing grids", 0, 1)
        palette: Palette[AnyRecipe] = palette_of(self.source, self.recipe, request.excluded)
        found = allocate(self.source, statistics, palette, request.target, workers)
        values = {**request.values(), "sensitivity": by, **found.values()}
        log(f"chosen: {found.extent.files:,} bytes, {found.extent.bits:.3f} bits per weight, {predicted_words(values)}")
        return {"recipe": found.recipe.model_dump(mode="json", exclude_unset=True), ALLOCATION: values}
