"""Rounding in C++: the numbers of the torch operations on whatever input, which every other test is about."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qconv.core import integer_grid
from qconv.core.qtensor import CHANNEL, Grid, QTensor
from qconv.core.rounding import round_in_place, round_to_nearest
from qconv.verification.weights import weight_error
from tests.compiled import by_torch, compile_for, require
from tests.integer_grids import GRIDS, weights

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@pytest.fixture(autouse=True, scope="module")
def library() -> None:
    """Without it, everything here would compare torch with torch."""
    require(integer_grid.LIBRARY)


def same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def assert_same(one: QTensor, other: QTensor) -> None:
    assert same_bits(one.codes, other.codes)
    assert same_bits(one.scales, other.scales)
    assert same_bits(one.zero_points, other.zero_points)


def finite(weight: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return weight.clamp(-limit, limit).to(dtype)


def ratios_of(weight: Tensor, grid: Grid) -> Tensor:
    generator = torch.Generator().manual_seed(len(weight))
    return torch.rand(len(weight), grid.groups(weight.shape[1]), generator=generator).clamp(min=0.3)


@given(weights(), GRIDS, DTYPES, st.booleans())
def test_codes_scales_and_zero_points_are_torchs(weight: Tensor, grid: Grid, dtype: torch.dtype, clipped: bool) -> None:
    weight = finite(weight, dtype)
    ratios = ratios_of(weight, grid) if clipped else None
    assert_same(round_to_nearest(weight, grid, ratios), by_torch(round_to_nearest, weight, grid, ratios))


@given(weights(), GRIDS, st.booleans())
def test_rounding_and_back_is_torchs_down_to_the_sign_of_zero(weight: Tensor, grid: Grid, clipped: bool) -> None:
    ratio = ratios_of(weight, grid) if clipped else 1.0
    expected = by_torch(round_in_place, weight.clone(), grid, ratio)
    assert same_bits(round_in_place(weight.clone(), grid, ratio), expected)


@pytest.mark.parametrize("width", [1, 7, 16, 255, 256, 257, 300, 1000])
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_may_have_any_width(width: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(5, 3 * width, generator=generator)
    grid = Grid(4, width, symmetric, torch.float32)
    quantized = round_to_nearest(weight, grid)
    assert_same(quantized, by_torch(round_to_nearest, weight, grid))
    assert len(set(quantized.codes.flatten().tolist())) > 8 or width < 7


def test_rows_need_not_lie_next_to_each_other() -> None:
    weight = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    grid = Grid(4, 16, symmetric=False, scale_dtype=torch.float16)
    quantized = round_to_nearest(weight.t(), grid)
    assert_same(quantized, round_to_nearest(weight.t().contiguous(), grid))
    error = weight_error(weight.t(), quantized, None, None)
    assert error == weight_error(weight.t().contiguous(), quantized, None, None)


@given(weights(-9, 9), GRIDS, DTYPES, st.booleans(), st.booleans())
def test_signal_and_noise_are_torchs(
    weight: Tensor, grid: Grid, dtype: torch.dtype, by_column: bool, by_row: bool
) -> None:
    weight = finite(weight, dtype)
    generator = torch.Generator().manual_seed(0)
    in_scale = torch.rand(weight.shape[1], generator=generator) + 0.5 if by_column else None
    out_scale = torch.rand(len(weight), generator=generator) + 0.5 if by_row else None
    quantized = round_to_nearest(weight, grid)
    found = weight_error(weight, quantized, in_scale, out_scale)
    expected = by_torch(weight_error, weight, quantized, in_scale, out_scale)
    assert found.signal == pytest.approx(expected.signal, rel=1e-13)
    assert found.noise == pytest.approx(expected.noise, rel=1e-13)


def test_signal_and_noise_of_known_numbers() -> None:
    # Codes 9 and 7 stand for 1 * 2 and -1 * 2; the weights after folding are 3 * 4 / 2 = 6 and 1 * 2 / 2 = 1.
    weight = QTensor(
        Grid(4, 2, symmetric=True, scale_dtype=torch.float32),
        torch.tensor([[9, 7]], dtype=torch.uint8),
        torch.tensor([[2.0]]),
        None,
    )
    error = weight_error(torch.tensor([[3.0, 1.0]]), weight, torch.tensor([4.0, 2.0]), torch.tensor([2.0]))
    assert (error.signal, error.noise) == (36.0 + 1.0, 16.0 + 9.0)


def test_what_it_does_not_know_is_left_to_torch() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    grid = Grid(4, 16, symmetric=True, scale_dtype=torch.float16)
    assert_same(round_to_nearest(weight.double(), grid), round_to_nearest(weight, grid))
    ordered = replace(round_to_nearest(weight, grid), group_index=torch.arange(32, dtype=torch.int32) % 2)
    assert integer_grid.squared_error(weight, ordered, None, None) is None


@pytest.mark.slow  # compiles the library anew
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 processors")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_the_numbers_do_not_depend_on_the_vectors(
    processor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(37, 768, generator=torch.Generator().manual_seed(0)).bfloat16()
    cases = [Grid(4, size, symmetric, torch.bfloat16) for size in (128, 24, CHANNEL) for symmetric in (True, False)]
    expected = [by_torch(round_to_nearest, weight, grid) for grid in cases]
    compile_for(processor, integer_grid.LIBRARY, tmp_path, monkeypatch)
    for grid, by_torch_operations in zip(cases, expected, strict=True):
        assert_same(round_to_nearest(weight, grid), by_torch_operations)
