"""Several builds from one calibration: what that makes of their recipes, and in what these must agree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from qconv.checkpoint.reader import read_json
from qconv.core.settings import CalibrationSettings, TextSettings
from qconv.errors import UsageError
from qconv.formats import get_format
from qconv.models import architecture
from qconv.planning.costs import Costs, Demand, demand_of, demand_of_gguf
from qconv.planning.estimate import Estimate, estimate
from qconv.planning.gguf_recipe import GgufCalibrationSettings, GgufRecipe
from qconv.planning.plan import ACTIVATION_BYTES
from qconv.planning.recipe import Recipe

OF_MATCHED = ("propagate", "matched_strength")
"""What does not count where layers see the outputs of unquantized ones."""


def unquantized(recipe: Recipe | GgufRecipe) -> Recipe | GgufRecipe:
    """The recipe with ``calibration.propagate: false``, if it is calibrated: all builds must see the same layers."""
    if isinstance(recipe, GgufRecipe):
        if not recipe.is_calibrated:
            return recipe
        settings = recipe.calibration or GgufCalibrationSettings()
        return recipe.model_copy(update={"calibration": settings.model_copy(update={"propagate": False})})
    if not _looks(recipe) or not recipe.calibration.propagate:
        return recipe
    calibration = recipe.calibration.model_copy(update={"propagate": False})
    return recipe.model_copy(update={"calibration": calibration})


def estimates(folder: Path, builds: Mapping[str, Recipe | GgufRecipe]) -> tuple[dict[str, Estimate], Costs]:
    """Several builds of the model in a folder as they are planned together, and what they cost together.

    Each layer is held once, with what the most demanding build needs of it; activations are there once.

    Raises:
        UsageError: they do not agree in their calibration.
        QconvError: as :func:`qconv.planning.estimate.estimate`.
    """
    looks: dict[str, tuple[CalibrationSettings | None, bool]] = {}
    found: dict[str, Estimate] = {}
    for name, given in builds.items():
        recipe = unquantized(given)
        if isinstance(recipe, GgufRecipe):
            calibrated = recipe.is_calibrated
            looks[name] = recipe.calibrated().calibration if calibrated else recipe.calibration, calibrated
        else:
            found[name] = estimate(folder, recipe)
            needed = found[name].plan.needs_calibration
            looks[name] = recipe.calibration if needed else None, needed
    require_agreement(looks)
    described = architecture(read_json(folder / "config.json"))
    hidden = described.hidden_size
    tokens = max((settings.tokens for settings, _ in looks.values() if settings is not None), default=0)
    demand = Demand(0)
    for name, recipe in builds.items():
        one = demand_of_gguf(described, recipe) if isinstance(recipe, GgufRecipe) else demand_of(found[name].plan)
        demand = demand.beside(one)
    return found, Costs.of(demand, tokens * hidden * ACTIVATION_BYTES)


def require_agreement(looks: Mapping[str, tuple[CalibrationSettings | None, bool]]) -> None:
    """Check that layers can be looked at once for all builds.

    Args:
        looks: By name of a build how it wants layers looked at, None for not at all, and whether they are rounded by
            what is seen; where only an importance matrix is asked for the text counts alone.

    Raises:
        UsageError: two do not agree; names the key and both values.
    """
    looking = {name: (settings, rounds) for name, (settings, rounds) in looks.items() if settings is not None}
    # The first that is rounded says how; the others are held against it.
    ordered = sorted(looking, key=lambda name: not looking[name][1])
    for name in ordered[1:]:
        first = ordered[0]
        (settings, rounds), (other, also) = looking[first], looking[name]
        fields = CalibrationSettings.model_fields if rounds and also else TextSettings.model_fields
        for key in fields:
            if key not in OF_MATCHED and getattr(settings, key) != getattr(other, key):
                raise UsageError(
                    f"{first} and {name} cannot be made of one calibration: calibration.{key} is "
                    f"{getattr(settings, key)} for {first} and {getattr(other, key)} for {name}.",
                    hint="Say the same in both, or make one after the other.",
                )


def _looks(recipe: Recipe) -> bool:
    """Whether a build is calibrated: by its method, or for stored scales of inputs."""
    grid = get_format(recipe.format).grid(recipe.grid, torch.bfloat16)
    return recipe.looks_at_activations or recipe.kv_cache is not None or grid.stores_inputs
