"""Rounding to nearest, and its search of the clipping range."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qconv.core import rounding
from qconv.core.qtensor import CHANNEL, Grid
from qconv.core.rounding import clip_ratios, round_to_nearest
from qconv.core.settings import ClipSettings
from qconv.grids.integers import mse_ratios, quantize

CLIP = ClipSettings(steps=8, max_shrink=0.6)
GRIDS = st.builds(
    Grid,
    bits=st.integers(2, 5),
    group_size=st.sampled_from([16, CHANNEL]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)


def heavy_tailed(seed: int, rows: int = 6, columns: int = 64) -> Tensor:
    """Weights with a few outliers, where clipping pays."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) ** 3


def squared_error(weight: Tensor, dequantized: Tensor, grid: Grid) -> Tensor:
    """By group, in float64."""
    difference = weight.double() - dequantized.double()
    return difference.view(len(weight), grid.groups(weight.shape[1]), -1).square().sum(-1)


@given(st.integers(0, 10**6), GRIDS)
def test_clipping_by_squared_error_is_never_worse_in_any_group(seed: int, grid: Grid) -> None:
    weight = heavy_tailed(seed)
    plain = squared_error(weight, quantize(weight, grid).dequantize(), grid)
    clipped = squared_error(weight, quantize(weight, grid, CLIP).dequantize(), grid)
    assert bool((clipped <= plain * (1 + 1e-5)).all())


@given(st.integers(0, 10**6), GRIDS)
def test_the_chosen_ratio_is_the_best_of_all_that_are_tried(seed: int, grid: Grid) -> None:
    weight = heavy_tailed(seed)
    chosen = squared_error(weight, round_to_nearest(weight, grid, mse_ratios(weight, grid, CLIP)).dequantize(), grid)
    for ratio in clip_ratios(CLIP):
        every = torch.full((len(weight), grid.groups(weight.shape[1])), ratio)
        assert bool(
            (chosen <= squared_error(weight, round_to_nearest(weight, grid, every).dequantize(), grid) * 1.00001).all()
        )


def test_clipping_pays_where_few_bits_meet_long_tails() -> None:
    grid = Grid(3, CHANNEL, symmetric=True, scale_dtype=torch.float16)
    weight = torch.randn(4, 1024, generator=torch.Generator().manual_seed(0))  # its largest are beyond 3 sigma
    plain = squared_error(weight, quantize(weight, grid).dequantize(), grid).sum()
    clipped = squared_error(weight, quantize(weight, grid, CLIP).dequantize(), grid).sum()
    assert clipped < 0.9 * plain


def test_a_tie_keeps_the_full_range() -> None:
    # Zeros cost nothing at any ratio.
    assert mse_ratios(torch.zeros(2, 32), Grid(4, 16, symmetric=True, scale_dtype=torch.float16), CLIP).tolist() == [
        [1.0, 1.0],
        [1.0, 1.0],
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("clip", [None, CLIP])
def test_the_weight_may_be_of_any_float_dtype_is_not_changed_and_rows_do_not_mix(
    dtype: torch.dtype, clip: ClipSettings | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = heavy_tailed(1, rows=13).to(dtype)
    before = weight.clone()
    grid = Grid(4, 16, symmetric=False, scale_dtype=torch.float16)
    whole = quantize(weight, grid, clip)
    assert torch.equal(weight, before)
    assert torch.equal(whole.codes, quantize(weight.float(), grid, clip).codes)
    monkeypatch.setattr(rounding, "_BLOCK_ELEMENTS", 4 * 64)
    parts = quantize(weight, grid, clip)
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.scales, whole.scales)
