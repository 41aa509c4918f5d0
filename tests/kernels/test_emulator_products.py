"""Every product kernel against float64, under every schedule, with no finding of any checker."""

from __future__ import annotations

import pytest
import torch

from qconv.runtime.kernel_interface import ROW_TILES
from tests.kernels.emulator import SCHEDULES, Schedule
from tests.kernels.products import CASES, Result, activations, case, depth_of, route, run_dense, run_experts

pytestmark = pytest.mark.kernels

LAYOUTS = tuple(CASES)
DTYPES = (torch.float16, torch.bfloat16)
ROWS = (1, 7, 16, 17, 33, 64)

# (tiles of k, slices): a block's slice has 1 to 7 tiles, fewer than the four stages and every residue modulo them.
# Layouts in blocks of 256 inputs have tiles in fours only, so it is their slices that make the counts.
TILES = ((1, 1), (2, 1), (4, 1), (5, 1), (6, 1), (7, 1), (7, 2), (2, 4))
TILES_OF_SUPERBLOCKS = ((4, 1), (4, 4), (4, 2), (8, 3), (20, 4), (12, 2), (20, 3))


def assert_right(result: Result, dtype: torch.dtype) -> None:
    """No error of a checker; the output is the float64 product, rounded once to its type.

    That rounding is at most half a unit in the last place, 2^-11 of a float16 and 2^-8 of a bfloat16 number; over a
    whole output its root mean square is at most 0.6 of it. Sums in float32 are off by less than 1e-6.
    """
    assert result.report.errors == ()
    if result.output.dtype == torch.float32:
        assert result.relative_error < 1e-6
    else:
        assert result.relative_error < {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype] * 0.6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", ROWS)
def test_dense(layout: str, rows: int, dtype: torch.dtype) -> None:
    """Row tiles larger than needed, exact and too small for the rows at once; all tile counts; all schedules."""
    row_tiles = [tile for tile in ROW_TILES if tile == 8 or tile < 2 * rows]
    for tiles, slices in TILES if depth_of(layout) == 32 else TILES_OF_SUPERBLOCKS:
        weight = case(layout, 128, tiles * 64, 128 if layout == "fp8" else 64)
        tokens = activations(rows, tiles * 64, dtype)
        for row_tile in row_tiles:
            for schedule in SCHEDULES:
                assert_right(run_dense(weight, tokens, row_tile, slices, schedule=schedule), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ragged_edges(layout: str) -> None:
    """Outputs that fill one and a quarter tile, inputs that end in the middle of one."""
    depth = 160 if depth_of(layout) == 32 else 256
    for dtype in DTYPES:
        for schedule in SCHEDULES:
            result = run_dense(case(layout, 160, depth, 32), activations(9, depth, dtype), 16, schedule=schedule)
            assert_right(result, dtype)


@pytest.mark.parametrize("group_size", [32, 64, 128, 192, 384])
@pytest.mark.parametrize("layout", ["awq", "int4"])
def test_groups(layout: str, group_size: int) -> None:
    """Groups smaller than a tile, as large, larger, and one a row of any length."""
    depth = group_size if group_size in (192,) else 384
    for slices in (1, 3):
        result = run_dense(case(layout, 128, depth, group_size), activations(5, depth, torch.float16), 8, slices)
        assert_right(result, torch.float16)


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts(layout: str, slices: int) -> None:
    """Six experts of which one gets most rows, one a single row and two none; two rows a token as in gate and up."""
    experts = torch.tensor([4, 0, 4, 2, 4, 0, 4, 5, 4, 2, 4, 4, 4, 4, 4, 4, 4, 0, 4, 0, 4, 2])
    weight = case(layout, 160, 256, 64, 6)
    for dtype in DTYPES:
        for row_tile in (8, 16, 32, 64):
            for schedule in SCHEDULES[1:3]:
                routing = route(experts, row_tile)
                tokens = activations(len(experts) // 2, 256, dtype)
                assert_right(run_experts(weight, tokens, routing, row_tile, 2, slices, schedule=schedule), dtype)


def test_experts_with_a_row_each() -> None:
    """As for down: row r of the output reads row r of the activations."""
    experts = torch.tensor([1, 0, 1, 3, 1])
    routing = route(experts, 8)
    result = run_experts(case("awq", 128, 192, 64, 4), activations(5, 192, torch.float16), routing, 8, 1)
    assert_right(result, torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2560, 6144), (6144, 2560)], ids=["gate", "down"])
def test_true_shapes(layout: str, shape: tuple[int, int]) -> None:
    """One expert of the 480B model, 16 tokens; in one slice and in the slices that a small batch gets."""
    tokens = activations(16, shape[1], torch.bfloat16)
    for slices in (1, 8):
        assert_right(run_dense(case(layout, *shape, 128), tokens, 16, slices, check=False), torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_interleavings(layout: str) -> None:
    """Thirty random schedules of every row tile, over depths that end in every stage."""
    for seed in range(30):
        for row_tile in ROW_TILES:
            tiles, slices = ((4 + seed % 4, 1), (20, 3 + seed % 2))[depth_of(layout) == 256]
            tokens = activations(row_tile, tiles * 64, torch.float16, seed)
            weight = case(layout, 128, tiles * 64, 64)
            schedule = Schedule(2, 100 + seed)
            assert_right(run_dense(weight, tokens, row_tile, slices, schedule=schedule), torch.float16)
