"""Integer and E4M3 grids as fits: what GPTQ or plain rounding made of them comes back, and scales stay storable."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qconv.core.grid import Surroundings
from qconv.core.qtensor import CHANNEL, Grid
from qconv.core.settings import ClipSettings, GptqSettings
from qconv.grids import e4m3, integers
from qconv.grids.elements import E4M3Grid, IntegerGrid
from qconv.methods import gptq
from tests.problems import ELEMENTS, random_hessian, random_weight, true_errors


@pytest.mark.parametrize("ordering", ["none", "static", "desc_act"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_gptq_made_comes_back(ordering: Any, symmetric: bool, dtype: torch.dtype) -> None:
    grid = Grid(4, 32, symmetric, dtype, act_order=ordering == "desc_act")
    weight, hessian = random_weight(5, 128, seed=1), random_hessian(128, seed=1)
    made = gptq.quantize(weight, grid, hessian, GptqSettings(ordering=ordering)).qtensor
    again = IntegerGrid(grid).fit(weight, made).pack(made.dequantize().t().contiguous())
    assert again.grid == made.grid
    for name in ("codes", "scales", "zero_points", "group_index"):
        ours, theirs = getattr(again, name), getattr(made, name)
        assert (ours is None) is (theirs is None)
        assert ours is None or (ours.dtype == theirs.dtype and torch.equal(ours, theirs) and ours.is_contiguous())


def test_its_own_rounding_is_todays() -> None:
    weight = random_weight(8, 256, seed=2)
    grid, clip = Grid(4, 128, False, torch.float16), ClipSettings(steps=5)
    assert torch.equal(IntegerGrid(grid, clip).encode(weight).codes, integers.quantize(weight, grid, clip).codes)
    blocks = Grid(8, 128, True, torch.bfloat16, "e4m3", 128)
    theirs = e4m3.quantize(weight, blocks, clip)
    assert torch.equal(E4M3Grid(blocks, clip).encode(weight).dequantize(), theirs.dequantize())


def test_act_order_makes_groups_of_columns_of_like_importance() -> None:
    grid, importance = Grid(4, 32, True, torch.float16, act_order=True), torch.rand(128)
    encoded = IntegerGrid(grid).encode(random_weight(4, 128, seed=3), importance)
    assert encoded.group_index is not None
    order = torch.argsort(importance, descending=True)
    assert encoded.group_index[order].tolist() == [place // 32 for place in range(128)]
    plain = integers.quantize(random_weight(4, 128, seed=3)[:, order], Grid(4, 32, True, torch.float16))
    assert torch.equal(encoded.dequantize()[:, order], plain.dequantize())


@given(name=st.sampled_from(list(ELEMENTS)), seed=st.integers(0, 10**6), scale=st.sampled_from([0.1, 1.0, 1e3]))
def test_a_refit_lowers_the_loss_and_leaves_codes(name: str, seed: int, scale: float) -> None:
    weight, hessian = random_weight(6, 256, seed) * scale, random_hessian(256, seed)
    grid = ELEMENTS[name]
    own = grid.encode(weight)
    fit, values = grid.fit(weight, own), own.dequantize().t().contiguous()
    around = Surroundings(0, hessian, values, hessian @ (weight.t() - values))
    for first in range(0, 256, fit.span):
        fit.refit_(first, around)
    refitted = fit.pack(values)
    before, after = (true_errors(one.dequantize(), weight, hessian) for one in (own, refitted))
    assert bool((after <= before * (1.0 + 1e-5)).all())
    assert torch.equal(refitted.dequantize(), values.t())
    assert (refitted.scales.dtype, refitted.scales.shape) == (own.scales.dtype, own.scales.shape)
    shared = isinstance(grid, E4M3Grid) and grid.grid.block_rows != 1
    # Scales that rows have for themselves are practically never the best for plainly rounded codes.
    assert bool((after < before).any()) is not shared
    if not shared:
        assert torch.equal(refitted.codes.float(), own.codes.float())


def test_names_say_what_shares_a_scale() -> None:
    names = [grid.name for grid in ELEMENTS.values()]
    assert names == [
        "int4 g128",
        "int4 g128 with zero points",
        "int3 per row",
        "int8 g32 with zero points",
        "int4 g64 with zero points in act_order",
        "E4M3 128x128",
        "E4M3 32x96",
        "E4M3 per row",
        "E4M3 per tensor",
    ]
    assert IntegerGrid(Grid(4, CHANNEL, True, torch.float16)).name == "int4 per row"


def test_static_activations_keep_their_scale() -> None:
    grid = Grid(8, CHANNEL, True, torch.float32, "e4m3", CHANNEL, activations="static")
    weight, scale = random_weight(3, 64, seed=4), torch.tensor(0.25)
    own = E4M3Grid(grid, input_scale=scale).encode(weight)
    again = E4M3Grid(grid, input_scale=scale).fit(weight, own).pack(own.dequantize().t().contiguous())
    assert own.input_scale is again.input_scale is scale
