"""MLX's affine grid: a group's codes reach from its least to its largest weight, whatever lies between."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qconv.core.qtensor import Grid, QTensor
from qconv.core.settings import ClipSettings
from qconv.grids import integers
from qconv.grids.affine import AffineGrid
from qconv.grids.of_formats import grid_of
from tests.grids.test_integers import heavy_tailed, squared_error

GRIDS = st.builds(
    Grid,
    bits=st.integers(2, 8),
    group_size=st.sampled_from([16, 32]),
    symmetric=st.just(False),
    scale_dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    based=st.just(True),
)


def extremes(values: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    grouped = values.view(len(values), grid.groups(values.shape[1]), -1)
    return grouped.amin(-1), grouped.amax(-1)


@given(st.integers(0, 10**6), GRIDS, st.sampled_from([0.0, 1.0, -40.0]))
def test_every_weight_is_within_half_a_step_and_what_rounding_scale_and_bias_costs(
    seed: int, grid: Grid, shift: float
) -> None:
    weight = heavy_tailed(seed) + shift
    made = AffineGrid(grid).encode(weight)
    assert made.biases is not None
    assert made.scales.dtype == made.biases.dtype == grid.scale_dtype
    low, high = extremes(weight, grid)
    epsilon = torch.finfo(grid.scale_dtype).eps
    allowed = made.scales.float() / 2 + epsilon * (high - low + torch.maximum(low.abs(), high.abs()))
    difference = (made.dequantize() - weight).abs()
    assert bool((extremes(difference, grid)[1] <= allowed * 1.0001).all())
    assert int(made.codes.max()) == grid.levels - 1
    assert int(made.codes.min()) == 0


@given(st.integers(0, 10**6), GRIDS)
def test_clipping_by_squared_error_is_never_worse_in_any_group(seed: int, grid: Grid) -> None:
    weight = heavy_tailed(seed)
    plain = squared_error(weight, AffineGrid(grid).encode(weight).dequantize(), grid)
    clipped = squared_error(weight, AffineGrid(grid, ClipSettings(steps=8)).encode(weight).dequantize(), grid)
    assert bool((clipped <= plain * (1 + 1e-5)).all())


def test_importance_moves_the_range_toward_what_counts() -> None:
    grid, weight = Grid(3, 32, False, torch.bfloat16, based=True), heavy_tailed(3, rows=64)
    importance = torch.ones(64)
    importance[::4] = 100.0
    search = AffineGrid(grid, ClipSettings(steps=8))
    alike, counted = (search.encode(weight, one).dequantize() - weight for one in (None, importance))
    assert float((counted.square() * importance).sum()) < 0.98 * float((alike.square() * importance).sum())


def test_groups_that_are_not_about_zero_are_nearer_than_with_zero_points() -> None:
    weight = 0.5 + 0.1 * torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    biased = AffineGrid(Grid(4, 32, False, torch.bfloat16, based=True)).encode(weight)
    zeros = integers.quantize(weight, Grid(4, 32, False, torch.bfloat16))
    errors = [float((one.dequantize() - weight).square().mean()) for one in (biased, zeros)]
    assert errors[0] < errors[1] / 2


@pytest.mark.parametrize("value", [0.0, 0.3, -7.0])
def test_a_group_of_one_value_is_that_value(value: float) -> None:
    grid = Grid(4, 32, False, torch.bfloat16, based=True)
    made = AffineGrid(grid).encode(torch.full((2, 64), value).bfloat16().float())
    assert bool((made.dequantize() == torch.tensor(value).bfloat16().float()).all())
    assert bool((made.scales > 0).all())


def test_formats_grid_is_this_one() -> None:
    grid = Grid(4, 64, False, torch.float16, based=True)
    found = grid_of(grid, None, None)
    assert isinstance(found, AffineGrid)
    assert found.name == "affine4 g64"
    assert isinstance(found.encode(torch.randn(2, 64)), QTensor)
