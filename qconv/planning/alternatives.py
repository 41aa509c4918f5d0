"""What calibrating a build that is not, or not calibrating one that is, would gain and cost, as far as it was measured.

The figures are those of docs/evidence: divergence of quality.md (the bundled model, all linears on one grid), time of
scale.md (a layer of Qwen3-Coder-480B's shapes, 16,384 tokens, two cores).
"""

from __future__ import annotations

from qconv.planning.gguf_recipe import GgufRecipe
from qconv.planning.recipe import Recipe

_OF_TYPE = {"Q2_K": 0.30, "Q3_K": 0.25, "IQ3": 0.26, "IQ4": 0.30, "Q4": 0.32, "Q5": 0.38, "Q6": 0.39}
"""What is left of the divergence of rounding with an importance matrix, by what a file type's name begins with."""
_OF_INTEGERS, _OF_FLOATS = 0.22, 0.40
"""The same of plain rounding to 4 bits, and to E4M3."""
_OF_SHORT_INPUTS = ("nvfp4_w4a4", "nvfp4_modelopt")
"""Formats whose inputs of 4 bits, of which no way is rid, outweigh what weights lose."""
_CALIBRATED, _ENCODED, _ROUNDED = "19 minutes", "3 minutes", "46 s"
"""What a layer takes: by GPTQ, by ggml's encoders, and by rounding to integers or floats."""


def other_way(recipe: Recipe | GgufRecipe) -> str | None:
    """A sentence about the other way of making a build; None where nothing was measured that is like it."""
    left = _left(recipe)
    if left is None:
        return None
    if isinstance(recipe, GgufRecipe):
        calibrated, alone = recipe.is_calibrated, _ENCODED
    else:
        calibrated, alone = recipe.looks_at_activations, _ROUNDED
    if calibrated:
        return (
            f"--method rtn: {1.0 / left:.1f} times the divergence on the bundled model; about {alone} instead of "
            f"{_CALIBRATED} or more for a layer of the 480B's shapes on two cores (docs/evidence: quality, scale)"
        )
    return (
        f"--calib python-stdlib --method gptq: {left:.2f} of the divergence on the bundled model; {_CALIBRATED} or "
        f"more instead of about {alone} for a layer of the 480B's shapes on two cores (docs/evidence: quality, scale)"
    )


def _left(recipe: Recipe | GgufRecipe) -> float | None:
    if recipe.rules:
        return None
    if isinstance(recipe, GgufRecipe):
        return next((left for start, left in _OF_TYPE.items() if recipe.type.startswith(start)), None)
    if recipe.format in _OF_SHORT_INPUTS:
        return None
    if recipe.format.startswith("fp8"):
        return None if recipe.format == "fp8_static" else _OF_FLOATS
    return _OF_INTEGERS if recipe.grid.bits == 4 else None
