"""A build of safetensors from a model and a recipe."""

from __future__ import annotations

from pathlib import Path

from qconv.artifacts.source import Source
from qconv.building.joining import shared
from qconv.building.output import Outcome, require_apart
from qconv.building.run import make_builds
from qconv.building.safetensors_target import SafetensorsTarget
from qconv.building.target import Log
from qconv.executors import DEFAULT
from qconv.planning.engines import judged, sentences
from qconv.planning.plan import plan_of
from qconv.planning.recipe import Recipe
from qconv.verification.outcome import Progress


def quantize(
    model: Path,
    out: Path,
    recipe: Recipe,
    *,
    restart: bool = False,
    threads: int | None = None,
    executor: str = DEFAULT,
    devices: str = "cpu",
    part: tuple[int, int] | None = None,
    progress: Progress,
    log: Log,
) -> Outcome:
    """Make a build, or continue one.

    Args:
        model: The source checkpoint's folder.
        out: The build's folder; made if absent.
        recipe: What to build.
        restart: Discard what ``out`` holds, if qconv made all of it.
        threads: Experts and matrices worked on at once; the bytes of the build do not depend on it.
        executor: Where the work runs, by name: a module of :mod:`qconv.executors`.
        devices: On what tensors are computed that are added up; see :func:`qconv.core.devices.devices_of`.
        part: Number and count of the share that is made, in a folder beside ``out``, of a build without calibration;
            :func:`qconv.building.collect_pipeline.collect` makes a build of all shares.
        progress: Told the unit at work, the weights done and the weights in all.
        log: Told about decisions, one sentence each.

    Raises:
        UsageError, RecipeError: the request cannot work.
        CheckpointError: the source is damaged.
        StaleJournalError: ``out`` belongs to a run with other inputs.
        OutputError: ``out`` is foreign, in use, or cannot be written.
        VerificationError: what was written does not stand for the source.
    """
    source = open_source(model, out, log)
    target = safetensors_target(source, recipe, out, "", log)
    if part is not None:
        target = shared(target, recipe, part)
        out = target.folder
    return make_builds(
        source,
        [target],
        out,
        restart=restart,
        threads=threads,
        executor=executor,
        devices=devices,
        progress=progress,
        log=log,
    )[0]


def open_source(model: Path, out: Path, log: Log) -> Source:
    """The model that is to be built into ``out``.

    Raises:
        UsageError: one folder contains the other, or the model cannot be published.
        CheckpointError: it is damaged.
    """
    require_apart(model, out)
    source = Source.open(model)
    source.require_publishable()
    for notice in source.notices():
        log(f"source: {notice}")
    return source


def safetensors_target(source: Source, recipe: Recipe, folder: Path, name: str, log: Log) -> SafetensorsTarget:
    """The target of a recipe.

    Raises:
        RecipeError: the recipe does not fit the model.
    """
    plan = plan_of(source, recipe)
    for notice in (*plan.notices(), *sentences(judged(plan, source), plan.format.name)):
        log(f"{name or 'build'}: {notice}")
    return SafetensorsTarget(source, plan, folder, name)
