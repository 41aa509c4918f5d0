"""A GGUF build from a model and a recipe."""

from __future__ import annotations

from pathlib import Path

from qconv import native
from qconv.artifacts.source import Source
from qconv.artifacts.verbatim import not_taken, parts_of
from qconv.building.gguf_report import needing_importance, require_compensated, require_coverage
from qconv.building.gguf_target import GgufTarget
from qconv.building.joining import shared
from qconv.building.output import Outcome
from qconv.building.pipeline import open_source
from qconv.building.run import make_builds
from qconv.building.target import Log
from qconv.core.settings import TextSettings
from qconv.executors import DEFAULT
from qconv.formats.gguf.imatrix import merge, read_imatrix
from qconv.formats.gguf.mixture import fallbacks
from qconv.grids.ggml import compiled
from qconv.planning.gguf_plan import GgufPlan, plan_gguf
from qconv.planning.gguf_recipe import GgufRecipe, require_matches
from qconv.verification.outcome import Progress


def quantize_gguf(
    model: Path,
    out: Path,
    recipe: GgufRecipe,
    *,
    restart: bool = False,
    threads: int | None = None,
    executor: str = DEFAULT,
    devices: str = "cpu",
    part: tuple[int, int] | None = None,
    progress: Progress,
    log: Log,
) -> Outcome:
    """Write a model as GGUF, or continue.

    Args:
        model: The source checkpoint's folder.
        out: The folder of the files; made if absent.
        recipe: What to build.
        restart: Discard what ``out`` holds, if qconv made all of it.
        threads: Experts, and blocks of rows, worked on at once; the bytes do not depend on it.
        executor: Where the work runs, by name: a module of :mod:`qconv.executors`.
        devices: On what tensors are computed that are added up; see :func:`qconv.core.devices.devices_of`.
        part: Number and count of the share that is made, in a folder beside ``out``, of a build without calibration;
            :func:`qconv.building.collect_pipeline.collect` makes a build of all shares.
        progress: Told what is at work, the weights done and the weights in all, of layers looked at and of encoding.
        log: Told about decisions, one sentence each.

    Raises:
        UsageError, RecipeError: the request cannot work.
        CheckpointError: the source or an imatrix is damaged.
        StaleJournalError: ``out`` belongs to a run with other inputs.
        OutputError: ``out`` is foreign, in use, or cannot be written.
        VerificationError: what was written does not stand for the source.
    """
    source = open_source(model, out, log)
    target = gguf_target(source, recipe, out, "", log)
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


def gguf_target(source: Source, recipe: GgufRecipe, folder: Path, name: str, log: Log) -> GgufTarget:
    """The target of a recipe.

    Raises:
        UsageError, RecipeError: the request cannot work.
        CheckpointError: the tokenizer or an imatrix is damaged.
    """
    given = tuple(read_imatrix(Path(file)) for file in recipe.imatrix.files)
    plan, text = _decide(source, recipe, f"{source.name}-{recipe.type}")
    if given:
        require_coverage(plan, recipe.imatrix.shrinkage_tokens, merge(given), complete=text is None)
    if text is not None and recipe.calibration is None and not recipe.is_calibrated:
        log(f"gguf:{recipe.type} needs an imatrix: one is collected")
    if source.verbatim:
        log(f"{name or 'build'}: {not_taken(parts_of(source.verbatim))}")
    replaced = fallbacks(plan.wanted, plan.types)
    if replaced is not None:
        log(f"types: {replaced}")
    native.load(compiled.LIBRARY)  # its warning, if there is one, comes before the progress bar
    return GgufTarget(source, plan, recipe, text, given, folder, name)


def _decide(source: Source, recipe: GgufRecipe, name: str) -> tuple[GgufPlan, TextSettings | None]:
    """The plan, and the text that layers are looked at on: the recipe's, or any where a type needs an imatrix."""

    override = recipe.override(source.dtype)

    def planned(importance: bool) -> GgufPlan:
        return plan_gguf(
            source,
            recipe.type,
            name,
            importance=importance,
            override=override,
            max_split_size=recipe.output.max_shard_size,
            folded=recipe.searches_scales,
            rope=recipe.rope,
        )

    text: TextSettings | None = recipe.calibrated().calibration if recipe.is_calibrated else recipe.calibration
    plan = planned(text is not None or bool(recipe.imatrix.files))
    require_matches(recipe, plan.tensors.values())
    if text is None and not recipe.imatrix.files and any(needing_importance(plan)):
        text = TextSettings()
        plan = planned(True)
    require_compensated(plan, recipe)
    return plan, text
