"""Formats: how QTensors are laid out in a safetensors checkpoint. A module's name is its format's registry key.

Each says which grids it can hold, which tensors stand for a linear, how words are packed and unpacked, and what
config.json says of it; ``base`` is what a format must be able to do. ``compressed_tensors``, ``packed``, ``float8`` and
``float4`` are words and layouts that several share, ``auto_round`` another tool's words for them, ``stacks`` tensors
that hold those of several modules.
``gguf`` is llama.cpp's container, with rules of its own.

A format knows no method and no statistics: it is given codes and scales, and gives them back.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

from qconv.errors import RecipeError
from qconv.formats.base import Format

_SHARED = ("auto_round", "base", "cache", "compressed_tensors", "float4", "float8", "gguf", "packed", "stacks")
"""The modules that are no formats of safetensors: what formats have in common, and GGUF."""


def formats() -> list[str]:
    """The names of all formats, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED)


def mixing_formats() -> list[str]:
    """The names of those that hold linears on different grids, sorted."""
    return [name for name in formats() if get_format(name).mixes]


def get_format(name: str) -> Format:
    """The format of that name.

    Raises:
        RecipeError: no such format.
    """
    if name not in formats():
        raise RecipeError(f"format: unknown format {name!r}.", hint=f"qconv writes {', '.join(formats())}.")
    found: Format = importlib.import_module(f"{__name__}.{name}").FORMAT
    return found


def known_formats() -> Iterator[Format]:
    """All formats that are read: those that are written, and of each module what is read alone."""
    for name in formats():
        module = importlib.import_module(f"{__name__}.{name}")
        yield module.FORMAT
        yield from getattr(module, "READ_ALONE", ())


def detect(config: dict[str, Any]) -> Format | None:
    """The format whose words a config.json's ``quantization_config`` uses, or None if none of those that are read."""
    section = config.get("quantization_config")
    if not isinstance(section, dict):
        return None
    return next((found for found in known_formats() if found.recognizes(section)), None)


__all__ = ["Format", "detect", "formats", "get_format", "mixing_formats"]
