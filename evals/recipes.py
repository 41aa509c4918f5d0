"""Packaged recipes by what they are for."""

from __future__ import annotations

from qconv.formats import formats, get_format
from qconv.planning.recipe import packaged_recipes, read_values

_FAMILY = "qwen3_moe"
"""The bundled model's, and the 480B's."""


def general_recipes() -> list[str]:
    """Those that are for the bundled model, sorted: all but those of a format that is another family's own."""
    return [name for name in packaged_recipes() if read_values(name)[0]["format"] not in _others()]


def general_formats() -> list[str]:
    """The formats of safetensors that are for the bundled model, sorted."""
    return [name for name in formats() if name not in _others()]


def _others() -> set[str]:
    """The formats that are not."""
    return {name for name in formats() if get_format(name).families and _FAMILY not in get_format(name).families}
