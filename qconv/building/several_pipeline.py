"""Several builds of a model from one calibration, each in its own folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qconv.building.gguf_pipeline import gguf_target
from qconv.building.output import Outcome
from qconv.building.pipeline import open_source, safetensors_target
from qconv.building.run import make_builds
from qconv.building.target import Log, Target
from qconv.executors import DEFAULT
from qconv.planning.gguf_recipe import GgufRecipe
from qconv.planning.recipe import Recipe
from qconv.planning.several import require_agreement, unquantized
from qconv.verification.outcome import Progress


def quantize_several(
    model: Path,
    out: Path,
    recipes: Mapping[str, Recipe | GgufRecipe],
    *,
    restart: bool = False,
    threads: int | None = None,
    executor: str = DEFAULT,
    devices: str = "cpu",
    progress: Progress,
    log: Log,
) -> dict[str, Outcome]:
    """Make several builds, or continue them: each layer is looked at once for all that are calibrated.

    They see the outputs of unquantized layers, whatever their recipes say: every build has the bytes that its recipe
    gives alone with ``propagate: false``.

    Args:
        model: The source checkpoint's folder.
        out: The folder of their folders; made if absent.
        recipes: What to build, by the name of its folder.
        restart: Discard what ``out`` holds, if qconv made all of it.
        threads: Experts and matrices worked on at once; the bytes do not depend on it.
        executor: Where the work runs, by name: a module of :mod:`qconv.executors`.
        devices: On what tensors are computed that are added up; see :func:`qconv.core.devices.devices_of`.
        progress: Told what is at work, the weights done and the weights in all.
        log: Told about decisions, one sentence each.

    Raises:
        UsageError: the recipes do not agree in their calibration; names the key and both values.
        QconvError: as :func:`qconv.building.pipeline.quantize`.
    """
    source = open_source(model, out, log)
    targets: list[Target] = []
    # In the order of their names, so that it makes no difference in which they were given.
    for name, given in sorted(recipes.items()):
        recipe = unquantized(given)
        if isinstance(recipe, GgufRecipe):
            targets.append(gguf_target(source, recipe, out / name, name, log))
        else:
            targets.append(safetensors_target(source, recipe, out / name, name, log))
    require_agreement({target.name: (target.calibration, target.calibrates) for target in targets})
    if any(target.calibrates for target in targets):
        log("several builds: each layer sees the outputs of unquantized ones (propagate: false)")
    outcomes = make_builds(
        source,
        targets,
        out,
        restart=restart,
        threads=threads,
        executor=executor,
        devices=devices,
        progress=progress,
        log=log,
    )
    return {target.name: outcome for target, outcome in zip(targets, outcomes, strict=True)}
