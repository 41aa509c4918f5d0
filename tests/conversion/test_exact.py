"""What a layout holds of another one's numbers: the same codes and scales, or a reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qconv.conversion.exact import grid_in, in_grid, same_numbers, stored_as
from qconv.core.qtensor import CHANNEL, Grid
from qconv.formats import get_format
from tests.conftest import random_float_qtensor, random_qtensor

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
INT4 = Grid(4, 32, True, F16)


@given(
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([32, CHANNEL]),
    symmetric=st.booleans(),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize(("first", "second"), [("gptq", "w4a16"), ("w4a16", "gptq"), ("gptq", "awq"), ("w4a16", "awq")])
def test_integers_there_and_back(first: str, second: str, bits: int, group: int, symmetric: bool, seed: int) -> None:
    grid = Grid(bits, group, symmetric, F16)
    weight = random_qtensor(grid, 32, 64, seed)
    there = grid_in(get_format(second), grid)
    if isinstance(there, str):
        assert second == "awq"
        assert bits == 8 or group == CHANNEL
        return
    found = in_grid(weight, there)
    assert not isinstance(found, str)
    assert torch.equal(found.dequantize(), weight.dequantize())
    packed = dict(get_format(second).pack("m", found))
    read = get_format(second).unpack("m", (32, 64), packed.__getitem__, there)
    assert torch.equal(read.dequantize(), weight.dequantize())
    back = grid_in(get_format(first), there)
    assert not isinstance(back, str)
    again = in_grid(read, replace(back, symmetric=symmetric))
    assert not isinstance(again, str)
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.scales.float(), weight.scales.float())


def test_blocks_of_fp8_are_the_same_under_two_names() -> None:
    native, library = get_format("fp8"), get_format("fp8_dynamic")
    grid = Grid(8, 128, True, F32, "e4m3", 128, activations="dynamic")
    weight = random_float_qtensor(grid, 256, 384, 0)
    there = grid_in(library, grid)
    assert isinstance(there, Grid)
    found = in_grid(weight, there)
    assert not isinstance(found, str)
    back = grid_in(native, there)
    assert isinstance(back, Grid)
    assert torch.equal(found.dequantize(), weight.dequantize())


@pytest.mark.parametrize(
    ("grid", "target", "why"),
    [
        (Grid(8, 32, True, F16), "awq", "4 bits"),
        (replace(INT4, act_order=True), "w4a16", "an order of their own"),
        (replace(INT4, act_order=True), "awq", "an order of their own"),
        (INT4, "fp8", "the fp8 format holds E4M3 floats alone"),
        (replace(INT4, activations="dynamic"), "w4a16", "format w4a16 has inputs that are not rounded"),
        (Grid(8, CHANNEL, True, BF16, "e4m3", 1, activations="dynamic"), "fp8", "blocks"),
        (Grid(3, 32, True, F16), "w4a16", "4 or 8 bits"),
    ],
)
def test_what_has_no_place_is_told(grid: Grid, target: str, why: str) -> None:
    found = grid_in(get_format(target), grid)
    assert isinstance(found, str)
    assert why in found
    assert not found.startswith("grid.")
    assert not found.endswith(".")


def test_scales_must_be_numbers_of_the_other_dtype() -> None:
    weight = random_qtensor(Grid(4, 32, True, BF16), 8, 64, 0)
    huge = replace(weight, scales=torch.full_like(weight.scales, 1e30))
    assert "no numbers of float16" in str(in_grid(huge, Grid(4, 32, False, F16)))
    assert "no numbers of bfloat16" in str(
        in_grid(replace(weight, grid=INT4, scales=torch.full((8, 2), 1.0009765625, dtype=F16)), Grid(4, 32, True, BF16))
    )
    assert stored_as(torch.tensor([-0.0]), F16) is not None
    assert stored_as(torch.tensor([0.1]), F16) is None


def test_weights_are_told_apart_by_one_code_one_scale_or_one_zero_point() -> None:
    grid = Grid(4, 32, False, F16)
    weight = random_qtensor(grid, 8, 64, 3)
    assert weight.zero_points is not None
    assert same_numbers(weight, replace(weight, grid=replace(grid, scale_dtype=F32), scales=weight.scales.float()))
    plain = random_qtensor(INT4, 8, 64, 3)
    with_points = in_grid(plain, grid)
    assert not isinstance(with_points, str)
    assert same_numbers(plain, with_points)
    codes, scales, points = weight.codes.clone(), weight.scales.clone(), weight.zero_points.clone()
    codes[3, 5] ^= 1
    scales[2, 1] = torch.nextafter(scales[2, 1], torch.tensor(9.0, dtype=F16))
    points[7, 0] ^= 1
    for other in (replace(weight, codes=codes), replace(weight, scales=scales), replace(weight, zero_points=points)):
        assert not same_numbers(weight, other)
    assert not same_numbers(weight, replace(weight, grid=replace(grid, group_size=CHANNEL)))
    ordered = replace(weight, grid=replace(grid, act_order=True), group_index=torch.arange(64, dtype=torch.int32) // 32)
    turned = replace(ordered, group_index=ordered.group_index.flip(0) if ordered.group_index is not None else None)
    assert same_numbers(ordered, ordered)
    assert not same_numbers(ordered, turned)
    assert not same_numbers(weight, ordered)
    assert not same_numbers(weight, weight.rows(0, 4))


def test_zero_points_go_only_where_they_say_nothing() -> None:
    plain = random_qtensor(INT4, 8, 64, 1)
    with_points = in_grid(plain, replace(INT4, symmetric=False))
    assert not isinstance(with_points, str)
    assert bool((with_points.zero_points == 8).all()) if with_points.zero_points is not None else False
    back = in_grid(with_points, INT4)
    assert not isinstance(back, str)
    assert back.zero_points is None
    other = random_qtensor(replace(INT4, symmetric=False), 8, 64, 2)
    assert "zero points" in str(in_grid(other, INT4))
