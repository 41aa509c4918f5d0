"""Several builds from one calibration: what that makes of their recipes, and in what these must agree."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qconv.core.settings import CalibrationSettings, TextSettings
from qconv.errors import UsageError
from qconv.formats import get_format
from qconv.planning.gguf_recipe import GgufCalibrationSettings, GgufRecipe
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
    """Whether a build is calibrated: by its method, or for the stored scales of static activations."""
    grid = get_format(recipe.format).grid(recipe.grid, torch.bfloat16)
    return recipe.looks_at_activations or grid.activations == "static"
