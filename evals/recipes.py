"""Packaged recipes by what they are for."""

from __future__ import annotations

from qconv.formats import formats, get_format
from qconv.planning.recipe import packaged_recipes, read_values


def general_recipes() -> list[str]:
    """Those that are for every family, sorted: all but those of a format that is a family's own."""
    return [name for name in packaged_recipes() if not _families(name)]


def general_formats() -> list[str]:
    """The formats of safetensors that are for every family, sorted."""
    return [name for name in formats() if not get_format(name).families]


def _families(recipe: str) -> tuple[str, ...]:
    name = read_values(recipe)[0]["format"]
    return get_format(name).families if name in formats() else ()
