"""Whether one layout holds another's numbers, and the same weight in it: code times scale in float32, bit for bit."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor

from qconv.core.qtensor import Grid, QTensor
from qconv.core.settings import GridSettings
from qconv.errors import RecipeError
from qconv.formats.base import Format

_INPUTS = {
    "none": "inputs that are not rounded",
    "dynamic": "inputs rounded token by token",
    "static": "inputs rounded by a stored scale",
    "local": "inputs rounded in groups",
}
"""What engines do with a linear's inputs, by :attr:`Grid.activations`."""


def grid_in(target: Format, grid: Grid) -> Grid | str:
    """The grid of a format that takes the values of another one's, or why there is none.

    One with zero points holds what one without them does.
    """
    reason = ""
    for symmetric in (grid.symmetric, None, False):
        try:
            settings = GridSettings(bits=grid.bits, group_size=grid.group_size, symmetric=symmetric)
            found = target.grid(settings, grid.scale_dtype, grid.number)
        except (RecipeError, ValueError) as error:
            reason = reason or _without_key(error.message if isinstance(error, RecipeError) else str(error))
            continue
        if grid.act_order:
            if not target.act_order:
                return f"format {target.name} has no place for groups of inputs in an order of their own"
            found = replace(found, act_order=True)
        differs = _difference(grid, found)
        if differs is None:
            return found
        reason = reason or f"format {target.name} has {differs}"
    return reason or f"format {target.name} has no such grid"


def _without_key(message: str) -> str:
    """What is wrong with a grid, without the key of a recipe, which there is none of."""
    return re.sub(r"^grid(\.\w+)?: ", "", message).rstrip(".")


def _difference(grid: Grid, found: Grid) -> str | None:
    """In what two grids differ that hold different values, or whose inputs an engine treats differently."""
    said = (
        ("other numbers", grid.number, found.number),
        (f"{found.bits} bits", grid.bits, found.bits),
        ("other groups", grid.group_size, found.group_size),
        ("other blocks", grid.block_rows, found.block_rows),
        (_INPUTS[found.activations], grid.activations, found.activations),
    )
    return next((what for what, one, other in said if one != other), None)


def in_grid(weight: QTensor, grid: Grid) -> QTensor | str:
    """A weight on a grid of :func:`grid_in`, its codes as they are; or why it has other numbers there."""
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


def same_numbers(one: QTensor, other: QTensor) -> bool:
    """Whether two weights have the same codes, zero points and steps, and so the same numbers in float32."""
    if one.shape != other.shape or _spread(one) != _spread(other):
        return False
    if one.group_index is not None and not torch.equal(one.group_index, _present(other.group_index)):
        return False
    return (
        torch.equal(one.codes.view(torch.uint8), other.codes.view(torch.uint8))
        and torch.equal(_points(one), _points(other))
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
