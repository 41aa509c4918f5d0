"""Whether one layout holds another's numbers, and the same weight in it: code times scale in float32, bit for bit."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from qconv.core.qtensor import Grid, QTensor
from qconv.core.settings import GridSettings
from qconv.errors import RecipeError
from qconv.formats.base import Format
from qconv.formats.mlx import biases_of

_SIZES = (128, 64, 32)
_INPUTS = {
    "none": "inputs that are not rounded",
    "dynamic": "inputs rounded token by token",
    "static": "inputs rounded by a stored scale",
    "local": "inputs rounded in groups",
}
"""What engines do with a linear's inputs, by :attr:`Grid.activations`."""


def grid_in(target: Format, grid: Grid, columns: Collection[int] = ()) -> Grid | str:
    """The grid of a format that takes the values of another one's, or why there is none.

    One with zero points holds what one without them does, and smaller groups what larger ones do.

    Args:
        target: The format.
        grid: The other one.
        columns: The lengths of the rows that lie on it.
    """
    reason = ""
    for size, symmetric in itertools.product((grid.group_size, *_finer(grid, columns)), (grid.symmetric, None, False)):
        try:
            settings = GridSettings(bits=grid.bits, group_size=size, symmetric=symmetric)
            found = target.grid(settings, grid.scale_dtype, grid.number)
        except (RecipeError, ValueError) as error:
            reason = reason or _without_key(error.message if isinstance(error, RecipeError) else str(error))
            continue
        if grid.act_order:
            if not target.act_order:
                return f"format {target.name} has no place for groups of inputs in an order of their own"
            found = replace(found, act_order=True)
        differs = _difference(grid, found, target.rounds_inputs)
        if differs is None:
            return found
        reason = reason or f"format {target.name} has {differs}"
    return reason or f"format {target.name} has no such grid"


def _without_key(message: str) -> str:
    """What is wrong with a grid, without the key of a recipe, which there is none of."""
    return re.sub(r"^grid(\.\w+)?: ", "", message).rstrip(".")


def _finer(grid: Grid, columns: Collection[int]) -> list[int]:
    """Sizes of groups into which groups of integers divide, the largest first."""
    if grid.is_float or grid.act_order or not columns:
        return []
    widths = {grid.width(one) for one in columns}
    return [size for size in _SIZES if all(width > size and width % size == 0 for width in widths)]


def _difference(grid: Grid, found: Grid, rounds_inputs: bool) -> str | None:
    """In what two grids differ that hold different values, or whose inputs an engine treats differently."""
    # Where readers round no inputs at all, what others do by token is no part of the build; a stored scale is.
    as_they_are = not rounds_inputs and not grid.stores_inputs
    said = (
        ("other numbers", grid.number, found.number),
        (f"{found.bits} bits", grid.bits, found.bits),
        ("other blocks", grid.block_rows, found.block_rows),
        (_INPUTS[found.activations], "none" if as_they_are else grid.activations, found.activations),
        ("no biases, and those of its groups are no whole number of steps", grid.based and not found.based, False),
    )
    return next((what for what, one, other in said if one != other), None)


def in_grid(weight: QTensor, grid: Grid) -> QTensor | str:
    """A weight on a grid of :func:`grid_in`, its codes as they are; or why it has other numbers there."""
    weight = _in_groups(weight, grid)
    if grid.based and weight.biases is None:
        return _with_biases(weight, grid)
    scales = stored_as(weight.scales, grid.scale_dtype)
    if scales is None:
        return f"its scales are no numbers of {str(grid.scale_dtype).removeprefix('torch.')}"
    zero_points = weight.zero_points
    if grid.symmetric and zero_points is not None:
        if bool((zero_points != grid.mid).any()):
            return "its zero points differ, and there is no place for them"
        zero_points = None
    elif not grid.symmetric and zero_points is None:
        zero_points = torch.full(weight.scales.shape, grid.mid, dtype=torch.uint8)
    return replace(weight, grid=grid, scales=scales, zero_points=zero_points)


def _in_groups(weight: QTensor, grid: Grid) -> QTensor:
    """The same with the scale of a larger group for each of those that it divides into."""
    width = grid.width(weight.shape[1])
    if weight.grid.is_float or weight.grid.width(weight.shape[1]) == width:
        return weight
    repeats = weight.grid.width(weight.shape[1]) // width
    zero_points = None if weight.zero_points is None else weight.zero_points.repeat_interleave(repeats, 1)
    scales, wide = weight.scales.repeat_interleave(repeats, 1), replace(weight.grid, group_size=grid.group_size)
    return replace(weight, grid=wide, scales=scales, zero_points=zero_points)


def _with_biases(weight: QTensor, grid: Grid) -> QTensor | str:
    """A weight with zero points, or none, with biases in their place."""
    scales = stored_as(weight.scales, grid.scale_dtype)
    dtype = str(grid.scale_dtype).removeprefix("torch.")
    if scales is None:
        return f"its scales are no numbers of {dtype}"
    found = replace(weight, grid=grid, scales=scales, zero_points=None, biases=biases_of(weight).to(grid.scale_dtype))
    if torch.equal(found.dequantize(), weight.dequantize()):
        return found
    return f"its zero points times scales are no numbers of {dtype}, which its biases would be"


def same_numbers(one: QTensor, other: QTensor) -> bool:
    """Whether two weights have the same codes, zero points and steps, and so the same numbers in float32."""
    if one.shape != other.shape or _spread(one) != _spread(other):
        return False
    if one.group_index is not None and not torch.equal(one.group_index, _present(other.group_index)):
        return False
    biased = one.biases is not None or other.biases is not None
    points = biases_of if biased else _points
    return (
        torch.equal(one.codes.view(torch.uint8), other.codes.view(torch.uint8))
        and torch.equal(points(one), points(other))
        and torch.equal(one.steps(), other.steps())
    )


def _spread(weight: QTensor) -> tuple[object, ...]:
    """What codes are, and which elements share a scale."""
    rows, columns = weight.shape
    grid = weight.grid
    return grid.number, weight.group_index is None, grid.rows_sharing(rows), grid.width(columns), weight.scales.shape


def _points(weight: QTensor) -> Tensor:
    """The zero points of integers; those of a symmetric grid are all its middle."""
    return (
        torch.tensor(weight.grid.mid, dtype=torch.uint8).expand(weight.scales.shape)
        if weight.zero_points is None
        else weight.zero_points
    )


def _present(index: Tensor | None) -> Tensor:
    assert index is not None
    return index


def stored_as(values: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The same numbers in another dtype; None where one of them is none of its numbers."""
    found = values.to(dtype)
    same = values.float().view(torch.int32) == found.float().view(torch.int32)
    return found if bool(same.all()) else None
