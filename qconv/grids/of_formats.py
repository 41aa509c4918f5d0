"""What puts weights on the grids that formats hold."""

from __future__ import annotations

from qconv.core.grid import FittedGrid
from qconv.core.qtensor import Grid, QTensor
from qconv.core.settings import ClipSettings
from qconv.grids import fp4, get_grid
from qconv.grids.affine import AffineGrid
from qconv.grids.elements import E4M3Grid, IntegerGrid


def grid_of(grid: Grid, values: str | None, clip: ClipSettings | None) -> FittedGrid[QTensor]:
    """The grid in whose own way weights are put on what a format holds.

    Args:
        grid: What the format holds.
        values: The module of :mod:`qconv.grids` that says which of its values; None for all of them.
        clip: The search of scales or clipping ranges; None for none.
    """
    if values is not None:
        return get_grid(values)(grid, clip)
    if grid.number == "e2m1":
        return fp4.grid_of(grid, search=clip is not None)
    if grid.based:
        return AffineGrid(grid, clip)
    return E4M3Grid(grid, clip) if grid.is_float else IntegerGrid(grid, clip)
