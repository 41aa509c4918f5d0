"""NVFP4 and MXFP4 against the layout that formats document, the gguf package, and plain arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gguf.quants import NVFP4
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qconv.core.qtensor import QTensor
from qconv.errors import UsageError
from qconv.grids.blocks import BlockGrid
from qconv.grids.fp4 import Mxfp4Grid, Nvfp4Grid, codes_of, global_scale, largest_magnitude, local_scale
from qconv.grids.ggml import GgmlType
from tests.problems import random_weight

VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
KINDS = ("nvfp4", "mxfp4")


def grid_of(kind: str, search: bool) -> Any:
    return Nvfp4Grid(search) if kind == "nvfp4" else Mxfp4Grid(search)


def numpy_values(weight: QTensor) -> Any:
    """As the layout says, in NumPy: float64 [out_features, in_features]."""
    codes: Any = weight.codes.numpy()
    magnitudes = np.array(VALUES)[codes & 7] * np.where(codes >> 3, -1.0, 1.0)
    if weight.grid.has_global_scale:
        steps = weight.scales.double().numpy() * weight.global_scale
    else:
        steps = np.exp2(weight.scales.view(torch.uint8).numpy().astype(np.float64) - 127.0)
    return magnitudes * np.repeat(steps, magnitudes.shape[1] // steps.shape[1], 1)


def test_codes_are_a_sign_and_a_place() -> None:
    values = torch.tensor([[*VALUES, *(-value for value in VALUES[1:]), -0.0]])
    assert codes_of(values).tolist() == [[*range(8), *range(9, 16), 0]]


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_exact(kind: str, search: bool) -> None:
    weight = grid_of(kind, search).encode(random_weight(5, 96, seed=0))
    assert torch.equal(weight.dequantize().double(), torch.from_numpy(numpy_values(weight)))
    assert torch.equal(weight.dequantize(torch.bfloat16).float(), weight.dequantize())
    assert weight.grid.has_global_scale == (kind == "nvfp4")


def test_the_gguf_package_reads_the_same_values() -> None:
    """Its NVFP4 holds 64 weights in a block: four scales, then elements i and i + 8 of each sixteen in a byte."""
    ours = Nvfp4Grid().encode(random_weight(4, 128, seed=1))
    codes = ours.codes.view(-1, 4, 2, 8)
    bytes_of = (codes[:, :, 0] | codes[:, :, 1] << 4).flatten(1)
    blocks = torch.cat([ours.scales.view(torch.uint8).view(-1, 4), bytes_of], dim=1)
    theirs = NVFP4.dequantize_blocks(blocks.numpy()).reshape(4, 128)
    assert torch.equal(torch.from_numpy(theirs) * ours.global_scale, ours.dequantize())


@given(exponent=st.integers(-30, 30), seed=st.integers(0, 10**6))
def test_plain_mxfp4_is_ggmls(exponent: int, seed: int) -> None:
    weight = random_weight(3, 64, seed) * 10.0**exponent
    ggml = BlockGrid(GgmlType.MXFP4).encode(weight)
    assert torch.equal(Mxfp4Grid(search=False).encode(weight).dequantize(), ggml.dequantize())


def test_plain_nvfp4_puts_the_largest_weight_of_a_group_at_six() -> None:
    weight = random_weight(4, 64, seed=2)
    shared = float(weight.abs().max() / 2688.0)
    ours = Nvfp4Grid(search=False, global_scale=shared).encode(weight)
    groups = weight.view(4, 4, 16)
    scales = (groups.abs().amax(2) / 6.0 / shared).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn)
    assert torch.equal(ours.scales.float(), scales.float())
    steps = (scales.float() * shared).unsqueeze(2)
    values = torch.tensor([*VALUES, *(-value for value in VALUES)])
    off = (groups.unsqueeze(3) - values * steps.unsqueeze(3)).abs().amin(3)
    assert torch.allclose((ours.dequantize().view_as(groups) - groups).abs(), off, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_search_costs_least_where_it_counts(kind: str) -> None:
    weight = random_weight(32, 256, seed=3)
    importance = torch.logspace(0, -4, 256)[torch.randperm(256, generator=torch.Generator().manual_seed(3))]

    def error(grid: Any, given: Tensor | None) -> float:
        return float(((grid.encode(weight, given).dequantize() - weight).square() * importance).sum())

    plain, even = error(grid_of(kind, False), None), error(grid_of(kind, True), None)
    weighted = error(grid_of(kind, True), importance)
    # Measured: NVFP4 0.75 and 0.42 of plain rounding; MXFP4, which has a power of two to choose, 0.951 and 0.886.
    limits = (0.8, 0.5) if kind == "nvfp4" else (0.97, 0.92)
    assert even < limits[0] * plain
    assert weighted < limits[1] * plain


@pytest.mark.parametrize("kind", KINDS)
def test_each_group_is_searched_for_itself(kind: str) -> None:
    weight, importance = random_weight(4, 128, seed=4), torch.linspace(1.0, 2.0, 128)
    whole = grid_of(kind, True).encode(weight, importance)
    shared = {"global_scale": whole.global_scale} if whole.grid.has_global_scale else {}
    for first in range(0, 128, 32):
        grid = Nvfp4Grid(**shared) if shared else Mxfp4Grid()
        # Importance is taken relative to the columns' mean, so a factor on it does not matter.
        part = grid.encode(weight[:, first : first + 32], 7.0 * importance[first : first + 32])
        assert torch.equal(part.dequantize(), whole.dequantize()[:, first : first + 32])


def test_linears_can_share_a_global_scale() -> None:
    small, large = random_weight(3, 32, seed=5), 50.0 * random_weight(3, 32, seed=6)
    shared = global_scale(largest_magnitude([small, large]))
    weights = [Nvfp4Grid(global_scale=shared).encode(one) for one in (small, large)]
    for encoded, weight in zip(weights, (small, large), strict=True):
        assert encoded.global_scale == shared
        # Steps are 2 of at most 6 wide at the top, and scales off by 1 part in 16.
        assert bool(((encoded.dequantize() - weight).abs() <= 0.25 * weight.abs().amax()).all())
    with pytest.raises(UsageError, match="global scale 1e-09 does not suit"):
        Nvfp4Grid(global_scale=1e-9).encode(large)
    with pytest.raises(ValueError, match="another global scale"):
        weights[0].with_rows(torch.tensor([True, False, True]), Nvfp4Grid().encode(small))


@given(largest=st.floats(1e-37, 3e38))
def test_the_global_scale_is_the_least_power_of_two_that_reaches(largest: float) -> None:
    scale = global_scale(largest)
    assert np.frexp(scale)[0] == 0.5
    assert largest <= scale * 2688.0
    assert scale == 2.0**-126 or largest > scale * 1344.0


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_have_scales_to_divide_by(kind: str) -> None:
    weight = torch.zeros(2, 64)
    weight[1, :32] = 0.75  # a power of two times six
    encoded = grid_of(kind, True).encode(weight)
    assert torch.equal(encoded.dequantize(), weight)
    assert bool((encoded.steps() > 0.0).all())
    assert torch.equal(grid_of(kind, True).encode(torch.zeros(2, 64)).dequantize(), torch.zeros(2, 64))


@pytest.mark.parametrize("kind", KINDS)
def test_groups_must_divide_the_row(kind: str) -> None:
    with pytest.raises(UsageError, match="do not divide 40 input features"):
        grid_of(kind, True).encode(torch.zeros(2, 40))


def test_what_matched_calibration_moves_beyond_the_shared_scale_is_cut_off() -> None:
    weight = random_weight(3, 32, seed=7)
    weight[1, 5] = 4.0 * weight.abs().max()
    shared = global_scale(float(weight.abs().max()) / 4.0)
    encoded = Nvfp4Grid(global_scale=shared).encode(weight)
    assert float(encoded.dequantize().abs().max()) == 2688.0 * shared
    assert not bool(encoded.scales.float().isnan().any())


def test_inputs_are_divided_so_that_all_of_e4m3_scales_their_groups() -> None:
    assert float(local_scale(5376.0)) == 2.0
    assert float(local_scale(0.0)) == 1.0
