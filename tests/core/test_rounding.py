"""Rounding to a grid: the nearest value, always; and a grid that covers the weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from qconv.core import rounding
from qconv.core.qtensor import Grid
from qconv.core.rounding import (
    assemble,
    clip_ratios,
    encode_,
    fake_quantize,
    grid_parameters,
    round_to_nearest,
    rounded_linear,
    row_blocks,
    to_codes,
)
from qconv.core.settings import ClipSettings
from tests.integer_grids import GRIDS, weights


@given(weights(), GRIDS)
def test_every_weight_gets_the_nearest_value_of_its_grid(weight: Tensor, grid: Grid) -> None:
    before = weight.clone()
    quantized = round_to_nearest(weight, grid)
    assert torch.equal(weight, before)
    rows, columns = weight.shape
    groups = grid.groups(columns)
    assert quantized.codes.dtype == torch.uint8
    assert int(quantized.codes.max()) < 1 << grid.bits
    assert quantized.scales.dtype == grid.scale_dtype
    assert quantized.scales.shape == (rows, groups)
    assert bool(torch.isfinite(quantized.scales).all())
    # Never subnormal: readers that flush those to zero would lose the group.
    assert bool((quantized.scales >= torch.finfo(grid.scale_dtype).smallest_normal).all())
    assert (quantized.zero_points is None) is grid.symmetric
    if quantized.zero_points is not None:
        assert quantized.zero_points.shape == (rows, groups)
        assert int(quantized.zero_points.max()) < 1 << grid.bits

    zeros = torch.full((rows, groups), 1 << (grid.bits - 1)) if grid.symmetric else quantized.zero_points
    assert zeros is not None
    scales = quantized.scales.double().unsqueeze(-1)
    # All values that a group can take: [rows, groups, 1, levels].
    values = ((torch.arange(1 << grid.bits) - zeros.unsqueeze(-1).double()) * scales).unsqueeze(2)
    grouped = weight.double().view(rows, groups, -1)
    least = (grouped.unsqueeze(-1) - values).abs().amin(-1)
    chosen = quantized.codes.long().view(rows, groups, -1).unsqueeze(-1)
    error = (grouped - values.expand(*grouped.shape, -1).gather(-1, chosen).squeeze(-1)).abs()
    # float32 division may take the other of two values that are equally near to 1e-6 of a step, or of the weight.
    slack = 1e-5 * scales + 1e-6 * grouped.abs()
    assert bool((error <= least + slack).all())
    assert bool((quantized.dequantize()[weight == 0.0] == 0.0).all()), "0 must stay exactly 0"


@given(weights(-3, 3), GRIDS)
def test_the_grid_covers_the_range(weight: Tensor, grid: Grid) -> None:
    # Where the scale is neither too small nor too large to be stored, nothing is cut off: the error is half a step on
    # a symmetric grid, and one where the zero point is rounded too. A stored scale is off by half its last bit.
    quantized = round_to_nearest(weight, grid)
    grouped = weight.view(len(weight), grid.groups(weight.shape[1]), -1)
    error = (quantized.dequantize().view_as(grouped) - grouped).abs().amax(-1)
    rounding = torch.finfo(grid.scale_dtype).eps / 2 * (1 << grid.bits)
    steps = (0.5 if grid.symmetric else 1.0) + rounding + 1e-4
    stored = quantized.scales.float()
    storable = stored > 2 * torch.finfo(grid.scale_dtype).smallest_normal
    assert bool((error <= steps * stored)[storable].all())
    # And no step is wasted: the largest weight uses at least the outer half of the codes.
    if not grid.symmetric:
        span = grouped.amax(-1).clamp(min=0) - grouped.amin(-1).clamp(max=0)
        assert bool((stored * (grid.levels - 1) <= span * (1 + 2 * rounding))[storable & (span > 0)].all())


@given(weights(-3, 3), GRIDS)
def test_codes_are_a_fixed_point_of_their_own_grid(weight: Tensor, grid: Grid) -> None:
    quantized = round_to_nearest(weight, grid)
    grouped = quantized.dequantize().view(*quantized.scales.shape, -1)
    again = to_codes(encode_(grouped, quantized.scales, quantized.zero_points, grid), grid.bits)
    assert torch.equal(again.view_as(quantized.codes), quantized.codes)


@given(weights(-3, 3), st.sampled_from([2, 4, 8]))
def test_quantizing_a_dequantized_weight_changes_nothing(weight: Tensor, bits: int) -> None:
    # On an asymmetric grid whose group reaches both ends of its codes the range, and with it all else, comes out again.
    # (On a symmetric one it does not: the scale is absmax / 7.5, and no code stands for 7.5.)
    grid = Grid(bits, 8, symmetric=False, scale_dtype=torch.float32)
    first = round_to_nearest(weight, grid)
    second = round_to_nearest(first.dequantize(), grid)
    grouped = first.codes.view(*first.scales.shape, -1)
    whole = (grouped.amin(-1) == 0) & (grouped.amax(-1) == grid.levels - 1)
    assert first.zero_points is not None
    assert second.zero_points is not None
    assert torch.equal(second.codes.view_as(grouped)[whole], grouped[whole])
    assert torch.equal(second.zero_points[whole], first.zero_points[whole])
    torch.testing.assert_close(second.scales[whole], first.scales[whole], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_zeros_is_harmless(symmetric: bool) -> None:
    quantized = round_to_nearest(torch.zeros(2, 16), Grid(4, 8, symmetric, torch.float16))
    assert bool((quantized.scales == 1.0).all())
    assert bool((quantized.dequantize() == 0.0).all())


def test_the_reference_formulas() -> None:
    # compressed-tensors: symmetric scale is absmax / 7.5; AutoAWQ: scale (max - min) / 15, zero round(-min / scale).
    weight = torch.tensor([[-7.5, 3.0, 1.0, 0.4, 0.0, 0.0, 0.0, 0.0]])
    symmetric = round_to_nearest(weight, Grid(4, 8, symmetric=True, scale_dtype=torch.float32))
    assert symmetric.scales.tolist() == [[1.0]]
    assert symmetric.codes.tolist() == [[0, 11, 9, 8, 8, 8, 8, 8]]  # -7.5 rounds to even: -8
    asymmetric = round_to_nearest(weight, Grid(4, 8, symmetric=False, scale_dtype=torch.float32))
    assert torch.allclose(asymmetric.scales, torch.tensor([[10.5 / 15]]))
    assert asymmetric.zero_points is not None
    assert asymmetric.zero_points.tolist() == [[11]]  # 7.5 / 0.7 = 10.7


@given(weights(-3, 3), GRIDS, st.floats(0.3, 1.0))
def test_a_ratio_shrinks_the_range(weight: Tensor, grid: Grid, ratio: float) -> None:
    grouped = weight.view(len(weight), grid.groups(weight.shape[1]), -1)
    full, _ = grid_parameters(weight, grid)
    shrunk, zeros = grid_parameters(weight, grid, ratio)
    by_group, same_zeros = grid_parameters(weight, grid, torch.full(grouped.shape[:2], ratio))
    assert torch.equal(shrunk, by_group)
    assert zeros is None or (same_zeros is not None and torch.equal(zeros, same_zeros))
    limits = torch.finfo(grid.scale_dtype)
    inside = (full.float() * ratio > 2 * limits.smallest_normal) & bool(grouped.abs().amax() > 0)
    inside &= grouped.abs().amax(-1) > 0
    torch.testing.assert_close(
        shrunk.float()[inside], (full.float() * ratio)[inside], rtol=2 * limits.eps + 1e-6, atol=0.0
    )


@given(weights(-3, 3), GRIDS)
def test_fake_quantize_is_round_and_back(weight: Tensor, grid: Grid) -> None:
    before = weight.clone()
    assert torch.equal(fake_quantize(weight, grid), round_to_nearest(weight, grid).dequantize())
    assert torch.equal(weight, before)


@given(weights(-3, 3), GRIDS, st.booleans())
def test_a_rounded_linear_is_the_product_with_the_rounded_weight(weight: Tensor, grid: Grid, scaled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(6, weight.shape[1], generator=generator)
    scale = torch.exp2(torch.randint(-2, 3, (weight.shape[1],), generator=generator).float()) if scaled else None
    rounded = fake_quantize(weight if scale is None else weight * scale, grid)
    before = weight.clone()
    found = rounded_linear(inputs, weight, grid, scale)
    expected = inputs.double() @ rounded.double().t()
    # Sums of up to 48 float32 products, which may cancel.
    slack = 1e-5 * (inputs.double().abs() @ rounded.double().abs().t())
    assert bool(((found.double() - expected).abs() <= slack).all())
    assert torch.equal(weight, before)


def test_blocks_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(23, 32, generator=generator)
    ratio = torch.rand(23, 4, generator=generator).clamp(min=0.5)
    for symmetric in (True, False):
        grid = Grid(4, 8, symmetric, torch.float16)
        whole, rounded = round_to_nearest(weight, grid, ratio), fake_quantize(weight, grid)
        monkeypatch.setattr(rounding, "_BLOCK_ELEMENTS", 5 * 32)  # five rows a block, three in the last
        parts = [round_to_nearest(weight[a:b], grid, ratio[a:b]) for a, b in row_blocks(23, 32)]
        assert len(parts) == 5
        joined = assemble(parts, 23)
        assert torch.equal(joined.codes, whole.codes)
        assert torch.equal(joined.scales, whole.scales)
        assert torch.equal(joined.dequantize(), whole.dequantize())
        assert torch.equal(fake_quantize(weight, grid), rounded)
        monkeypatch.undo()


@given(st.integers(1, 5000), st.integers(1, 2**13), st.integers(1, 200))
@example(2560, 6144, 8)
def test_blocks_cover_every_row_once_and_begin_at_multiples(rows: int, columns: int, multiple: int) -> None:
    blocks = list(row_blocks(rows, columns, multiple))
    assert [row for start, stop in blocks for row in range(start, stop)] == list(range(rows))
    assert all(start % multiple == 0 for start, _ in blocks)
    # As large as the cache allows, but for the last one: a multiple more would be too many elements.
    for start, stop in blocks[:-1]:
        assert (stop - start) * columns <= 2**19 < (stop - start + multiple) * columns or stop - start == multiple


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_survives_its_conversion(bits: int) -> None:
    values = torch.arange(1 << bits)
    assert torch.equal(to_codes(values.float(), bits), values.to(torch.uint8))


def test_clip_ratios_start_at_the_full_range_and_stay_above_the_bound() -> None:
    ratios = clip_ratios(ClipSettings(steps=10, max_shrink=0.5))
    assert ratios[0] == 1.0
    assert len(ratios) == 10
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] > 0.5
