"""The palette of a recipe, by its format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from qconv.artifacts.source import Source
from qconv.core.settings import CalibrationSettings, TextSettings
from qconv.planning.gguf_recipe import GgufCalibrationSettings, GgufRecipe
from qconv.planning.recipe import Recipe
from qconv.sensitivity.gguf_types import GgufTypes
from qconv.sensitivity.integer_schemes import IntegerSchemes

AnyRecipe: TypeAlias = Recipe | GgufRecipe
AnyPalette: TypeAlias = GgufTypes | IntegerSchemes


def palette_of(source: Source, recipe: AnyRecipe, excluded: Sequence[str]) -> AnyPalette:
    """What a build's units can become.

    Raises:
        UsageError: the format holds no mixture; a pattern of ``excluded`` fits nothing, or everything.
    """
    if isinstance(recipe, GgufRecipe):
        return GgufTypes(source, recipe, excluded)
    return IntegerSchemes(source, recipe, excluded)


def calibrated(recipe: AnyRecipe) -> AnyRecipe:
    """A recipe with text, on which the sensitivity is measured, too: the default one's where it names none."""
    if isinstance(recipe, Recipe) or recipe.calibration is not None:
        return recipe
    return GgufRecipe.model_validate(
        {**recipe.model_dump(exclude_unset=True), "calibration": GgufCalibrationSettings()}
    )


def text_of(recipe: AnyRecipe) -> TextSettings:
    """The text of a :func:`calibrated` recipe."""
    calibration: CalibrationSettings | None = recipe.calibration
    assert calibration is not None
    return TextSettings.model_validate(calibration.model_dump(include=set(TextSettings.model_fields)))
