"""Grids: which values a weight can take, and how it is put on them.

A grid fits a weight's scales by a search of its own; they are fixed from then on, so that columns can be rounded in any
order, each from wherever compensation has moved it. What is rounded is packed into the form that files hold.

    base.py         what every grid and every fitted weight offers
    nearest.py      the nearest whole numbers, short floats, values of a codebook
    scales.py       scales and bases by group and row, and what can become of them for given codes
    steps.py        weights rounded one by one: integers, floats, ggml's affine and scaled types
    lattices.py     weights rounded eight at a time: IQ2 and IQ3
    blocks.py       ggml's types
    fp4.py          NVFP4 and MXFP4
    elements.py     integer and E4M3 grids
    of_formats.py   which of them a format's grid is

Any other module is a grid by its own name: ``GRID`` of it is called with what a format can hold
(:class:`qconv.core.qtensor.Grid`) and the search of clipping ranges, and gives a grid of those values in whose own way
weights are put on them (:class:`qconv.core.grid.FittedGrid`). Recipes ask for it by ``grid: {values: NAME}`` and by
rules.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qconv.core.grid import FittedGrid
    from qconv.core.qtensor import Grid, QTensor
    from qconv.core.settings import ClipSettings

_SHARED = frozenset(
    (
        "blocks",
        "e4m3",
        "elements",
        "fp4",
        "ggml",
        "integers",
        "lattices",
        "nearest",
        "of_formats",
        "scales",
        "steps",
        "turns",
    )
)
"""The modules that grids have in common, and the grids that formats take by themselves."""


def grids() -> list[str]:
    """The names of the grids that a recipe can ask for, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED)


def get_grid(name: str) -> Callable[[Grid, ClipSettings | None], FittedGrid[QTensor]]:
    """The grid of that name, one of :func:`grids`."""
    found: Callable[[Grid, ClipSettings | None], FittedGrid[QTensor]]
    found = importlib.import_module(f"{__name__}.{name}").GRID
    return found


__all__ = ["get_grid", "grids"]
