"""GPTQ against the paper's own per-column procedure, and what must hold for any weight and any second moments."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qconv.core.hessian import factorize, row_errors
from qconv.core.qtensor import CHANNEL, Grid, QTensor
from qconv.core.rounding import clip_ratios, round_to_nearest
from qconv.core.settings import ClipSettings, GptqSettings
from qconv.errors import QconvError, RecipeError, UsageError
from qconv.grids import integers
from qconv.methods.gptq import GptqResult, quantize
from qconv.planning.recipe import parse_recipe
from tests.problems import HESSIANS, random_hessian, random_weight, rounding_noise, true_errors

ORDERINGS = ("none", "static")


def grid_of(bits: int = 4, group_size: int = 32, symmetric: bool = True, dtype: torch.dtype = torch.float32) -> Grid:
    return Grid(bits, group_size, symmetric, dtype)


def reference_scales(members: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a group's full range, from the definition of the grid: float64 [rows] each."""
    if grid.symmetric:
        scale = members.abs().amax(1) * 2.0 / (grid.levels - 1)
        return scale, torch.full_like(scale, grid.mid)
    low, high = members.amin(1).clamp(max=0.0), members.amax(1).clamp(min=0.0)
    scale = (high - low) / (grid.levels - 1)
    return scale, torch.round(-low / scale)


def reference(weight: Tensor, grid: Grid, hessian: Tensor, settings: GptqSettings) -> Tensor:
    """The procedure of the paper, one column after the other (equations 2 and 3), float64 [out_features, in_features].

    Quantize column q of those that remain, F; add ``-(w_q - quant(w_q)) / [H_F^-1]_qq * (H_F^-1)_q,:`` to the others;
    take row and column q out of H_F^-1 by elimination.
    """
    weight, hessian = weight.double(), hessian.double()
    columns = weight.shape[1]
    width = grid.width(columns)
    damping = settings.damp_percent * hessian.diagonal().mean()
    inverse = torch.linalg.inv(hessian + damping * torch.eye(columns, dtype=torch.float64))
    order = list(range(columns))
    if settings.ordering == "static":
        order.sort(key=lambda column: -float(hessian[column, column]))
    current, result, parameters = weight.clone(), torch.empty_like(weight), {}
    for column in order:
        group = column // width
        if group not in parameters:
            source = weight if settings.ordering == "static" else current
            parameters[group] = reference_scales(source[:, group * width : (group + 1) * width], grid)
        scale, zero = parameters[group]
        codes = (torch.round(current[:, column] / scale) + zero).clamp(0, grid.levels - 1)
        result[:, column] = (codes - zero) * scale
        error = (current[:, column] - result[:, column]) / inverse[column, column]
        current -= error.unsqueeze(1) * inverse[column]
        inverse -= inverse[:, column].unsqueeze(1) * inverse[column] / inverse[column, column]
    return result


@pytest.mark.parametrize(
    ("ordering", "group_size", "symmetric", "bits"),
    [*itertools.product(ORDERINGS, (32, 64, CHANNEL), (True, False), (3, 4)), ("none", 24, True, 4)],
)
def test_it_rounds_as_the_paper_does(ordering: Any, group_size: int, symmetric: bool, bits: int) -> None:
    in_features = 96 if group_size == 24 else 128
    weight, hessian = random_weight(24, in_features, seed=bits), random_hessian(in_features, seed=bits)
    grid, settings = grid_of(bits, group_size, symmetric), GptqSettings(block_size=48, ordering=ordering)
    result = quantize(weight, grid, hessian, settings)
    assert (result.damp_percent, result.escalations, result.dead_columns) == (0.01, 0, 0)
    theirs, nearest = reference(weight, grid, hessian, settings), integers.quantize(weight, grid).dequantize()
    worse = true_errors(nearest, weight, hessian) < true_errors(theirs, weight, hessian)
    assert result.kept_rtn == int(worse.sum()) <= 1
    theirs[worse] = nearest[worse].double()
    # Where float32 meets a tie the other way, the row goes its own way from there: at most one of 24.
    apart = (result.qtensor.dequantize().double() - theirs).abs().amax(1) > 1e-5
    assert int(apart.sum()) <= 1


@pytest.mark.parametrize("ordering", ORDERINGS)
@pytest.mark.parametrize("group_size", [32, 128, CHANNEL])
def test_the_block_size_does_not_matter(ordering: Any, group_size: int) -> None:
    weight, hessian = random_weight(24, 256, seed=7), random_hessian(256, seed=7)
    grid = grid_of(4, group_size, symmetric=False, dtype=torch.float16)
    results = [
        quantize(weight, grid, hessian, GptqSettings(block_size=size, ordering=ordering), ClipSettings())
        for size in (1, 7, 32, 100, 128, 1000)
    ]
    for result in results[1:]:
        apart = (result.qtensor.codes != results[0].qtensor.codes).any(1)
        assert int(apart.sum()) <= 1
        assert result.error == pytest.approx(results[0].error, rel=0.01)


@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    width=st.sampled_from([8, 32, CHANNEL]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    groups=st.integers(1, 3),
    rows=st.integers(1, 9),
    ordering=st.sampled_from([*ORDERINGS, "desc_act"]),
    block_size=st.integers(1, 80),
    clip=st.sampled_from([None, ClipSettings(steps=4)]),
    kind=st.sampled_from(HESSIANS),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
    seed=st.integers(0, 10**6),
)
def test_never_worse_than_rounding_to_nearest(
    bits: int,
    symmetric: bool,
    width: int,
    dtype: torch.dtype,
    groups: int,
    rows: int,
    ordering: Any,
    block_size: int,
    clip: ClipSettings | None,
    kind: str,
    scale: float,
    seed: int,
) -> None:
    in_features = 32 * groups
    weight, hessian = random_weight(rows, in_features, seed), random_hessian(in_features, seed, kind) * scale
    before = weight.clone(), hessian.clone()
    act_order = ordering == "desc_act"
    grid = Grid(bits, width, symmetric, dtype, act_order=act_order)
    settings = GptqSettings(block_size=block_size, ordering=ordering)
    result = quantize(weight, grid, hessian, settings, clip)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
    assert_sound(result, grid, weight)
    ours, nearest = result.qtensor.dequantize(), nearest_in_groups(weight, result.qtensor)
    errors, rtn_errors = true_errors(ours, weight, hessian), true_errors(nearest, weight, hessian)
    noise = rounding_noise(ours - weight, hessian), rounding_noise(nearest - weight, hessian)
    assert bool((errors <= rtn_errors + noise[0] + noise[1]).all())
    assert result.error <= result.rtn_error
    assert abs(result.error - float(errors.sum())) <= float(noise[0].sum())
    assert abs(result.rtn_error - float(rtn_errors.sum())) <= float(noise[1].sum())


def nearest_in_groups(weight: Tensor, like: QTensor) -> Tensor:
    """Plain rounding in the groups of ``like``."""
    if like.group_index is None:
        return integers.quantize(weight, like.grid).dequantize()
    order = torch.argsort(like.group_index, stable=True)
    return integers.quantize(weight[:, order], like.grid).dequantize()[:, torch.argsort(order)]


def assert_sound(result: GptqResult, grid: Grid, weight: Tensor) -> None:
    """A tensor of the grid with finite weights, each group's scale positive."""
    qtensor = result.qtensor
    groups = grid.groups(weight.shape[1])
    assert qtensor.grid == grid
    assert (qtensor.codes.dtype, qtensor.shape) == (torch.uint8, tuple(weight.shape))
    assert int(qtensor.codes.max()) < grid.levels
    assert (qtensor.scales.dtype, tuple(qtensor.scales.shape)) == (grid.scale_dtype, (len(weight), groups))
    assert bool((torch.isfinite(qtensor.scales) & (qtensor.scales > 0)).all())
    assert (qtensor.zero_points is None) is grid.symmetric
    if qtensor.zero_points is not None:
        assert (qtensor.zero_points.dtype, qtensor.zero_points.shape) == (torch.uint8, qtensor.scales.shape)
        assert int(qtensor.zero_points.max()) < grid.levels
    assert (qtensor.group_index is None) is not grid.act_order
    if qtensor.group_index is not None:
        assert qtensor.group_index.dtype == torch.int32
        assert torch.bincount(qtensor.group_index).tolist() == [grid.width(weight.shape[1])] * groups
    assert bool(torch.isfinite(qtensor.dequantize()).all())
    for tensor in (qtensor.codes, qtensor.scales):
        assert tensor.is_contiguous()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", [None, ClipSettings()])
def test_act_order_is_no_order_on_columns_sorted_by_importance(symmetric: bool, clip: ClipSettings | None) -> None:
    weight, hessian = random_weight(24, 128, seed=11), random_hessian(128, seed=11)
    order = torch.argsort(hessian.diagonal(), descending=True)
    grid = Grid(4, 32, symmetric, torch.float32, act_order=True)
    result = quantize(weight, grid, hessian, GptqSettings(ordering="desc_act"), clip)
    plain, sorted_hessian = grid_of(symmetric=symmetric), hessian[order][:, order]
    expected = quantize(weight[:, order].contiguous(), plain, sorted_hessian, GptqSettings(ordering="none"), clip)
    assert result.qtensor.group_index is not None
    assert result.qtensor.group_index[order].tolist() == [place // 32 for place in range(128)]
    # The traces are summed in another order, so a row may be kept that the other one replaced: at most one of 24.
    assert int((result.qtensor.codes[:, order] != expected.qtensor.codes).any(1).sum()) <= 1
    assert int((result.qtensor.scales != expected.qtensor.scales).any(1).sum()) <= 1


def test_the_grid_and_the_ordering_must_agree() -> None:
    with pytest.raises(UsageError, match="ordering desc_act does not suit"):
        quantize(torch.zeros(4, 32), grid_of(), torch.eye(32), GptqSettings(ordering="desc_act"))


@pytest.mark.parametrize("ordering", ORDERINGS)
@pytest.mark.parametrize("clip", [None, ClipSettings()])
def test_it_is_far_better_on_correlated_inputs(ordering: Any, clip: ClipSettings | None) -> None:
    weight, hessian = random_weight(32, 256, seed=3), random_hessian(256, seed=3)
    result = quantize(weight, grid_of(group_size=128), hessian, GptqSettings(ordering=ordering), clip)
    # Measured: 0.20 to 0.27 of rounding's error. Errors handed to the wrong columns come out above 0.5.
    assert result.error < 0.35 * result.rtn_error
    assert result.kept_rtn == 0


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_each_group_takes_the_ratio_that_costs_least(ordering: Any) -> None:
    # Uncorrelated inputs: nothing to compensate, so a group's cost is that of its ratio, column by column.
    weight, grid, clip = random_weight(8, 128, seed=2), grid_of(3, 32), ClipSettings(steps=8)
    sizes = torch.logspace(0, -4, 128)[torch.randperm(128, generator=torch.Generator().manual_seed(2))]
    result = quantize(weight, grid, sizes.diag(), GptqSettings(damp_percent=1e-6, ordering=ordering), clip)
    costs = [
        ((round_to_nearest(weight, grid, torch.full((8, 4), ratio)).dequantize() - weight).square() * sizes)
        .view(8, 4, 32)
        .sum(-1)
        for ratio in clip_ratios(clip)
    ]
    # The damping weighs the cheapest columns a little more than they cost.
    assert result.error == pytest.approx(float(torch.stack(costs).amin(0).sum()), rel=1e-3)


def test_clipping_lowers_the_error() -> None:
    weight, hessian = random_weight(32, 256, seed=4), random_hessian(256, seed=4)
    grid, settings = grid_of(3, 128), GptqSettings()
    full = quantize(weight, grid, hessian, settings)
    clipped = quantize(weight, grid, hessian, settings, ClipSettings())
    assert clipped.error < 0.9 * full.error
    # The identity is what is left of the search with one ratio.
    assert torch.equal(
        quantize(weight, grid, hessian, settings, ClipSettings(steps=1)).qtensor.codes, full.qtensor.codes
    )


def test_uncorrelated_inputs_leave_rounding_to_nearest() -> None:
    weight, grid = random_weight(8, 64, seed=0), grid_of()
    result = quantize(weight, grid, torch.eye(64), GptqSettings())
    assert torch.equal(result.qtensor.codes, integers.quantize(weight, grid).codes)
    assert result.error == result.rtn_error


@pytest.mark.parametrize("ordering", ORDERINGS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_an_all_zero_weight_stays_zero(ordering: Any, symmetric: bool) -> None:
    weight, grid = torch.zeros(8, 64), grid_of(symmetric=symmetric, dtype=torch.float16)
    result = quantize(weight, grid, random_hessian(64, seed=0), GptqSettings(ordering=ordering), ClipSettings())
    assert_sound(result, grid, weight)
    assert torch.equal(result.qtensor.dequantize(), weight)
    assert result.error == 0.0


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_no_tokens_are_rounding_to_nearest(ordering: Any) -> None:
    weight, grid = random_weight(8, 64, seed=0), grid_of()
    result = quantize(weight, grid, torch.zeros(64, 64), GptqSettings(ordering=ordering))
    assert torch.equal(result.qtensor.codes, integers.quantize(weight, grid).codes)
    assert (result.error, result.rtn_error, result.dead_columns, result.escalations) == (0.0, 0.0, 64, 0)


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_dead_columns_keep_their_weights_and_pass_nothing_on(ordering: Any) -> None:
    weight, hessian = random_weight(8, 96, seed=5), random_hessian(96, seed=5, kind="dead columns")
    grid, settings = grid_of(group_size=CHANNEL), GptqSettings(ordering=ordering)
    result = quantize(weight, grid, hessian, settings)
    assert result.dead_columns == 32
    dead = torch.arange(0, 96, 3)
    off = (result.qtensor.dequantize() - weight)[:, dead].abs()
    assert bool((off <= 0.5001 * result.qtensor.scales).all())
    # Whatever they hold, the others come out the same; small enough that they do not set the scales.
    changed = weight.clone()
    changed[:, dead] *= 0.1
    weight = weight.clone()
    weight[:, dead] *= 0.5
    live = torch.tensor([column for column in range(96) if column % 3])
    codes = [quantize(one, grid, hessian, settings).qtensor.codes[:, live] for one in (weight, changed)]
    assert torch.equal(*codes)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_that_plain_rounding_serves_better_are_its_own(symmetric: bool) -> None:
    weight, hessian = random_weight(16, 64, seed=6), random_hessian(64, seed=6)
    grid, settings = grid_of(symmetric=symmetric, dtype=torch.float16), GptqSettings()
    # Compensation for other inputs misleads.
    misled = factorize(random_hessian(64, seed=60), settings)
    result = quantize(weight, grid, hessian, settings, None, misled)
    nearest = integers.quantize(weight, grid)
    same = (result.qtensor.codes == nearest.codes).all(1)
    assert 0 < result.kept_rtn <= int(same.sum())
    assert torch.equal(result.qtensor.scales[same], nearest.scales[same])
    assert result.error <= result.rtn_error
    errors = true_errors(result.qtensor.dequantize(), weight, hessian)
    assert bool((errors <= 1.0001 * true_errors(nearest.dequantize(), weight, hessian)).all())


def test_a_factor_serves_every_linear_of_one_input() -> None:
    hessian, settings, grid = random_hessian(64, seed=8), GptqSettings(), grid_of()
    factor = factorize(hessian, settings)
    for seed in (0, 1):
        weight = random_weight(8, 64, seed)
        shared, own = (quantize(weight, grid, hessian, settings, None, one) for one in (factor, None))
        assert torch.equal(shared.qtensor.codes, own.qtensor.codes)


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_the_factor_is_of_the_damped_hessian(ordering: Any) -> None:
    hessian = random_hessian(64, seed=9)
    factor = factorize(hessian, GptqSettings(damp_percent=0.05, ordering=ordering))
    upper = (factor.upper * factor.costs.sqrt()).double()
    ordered = hessian[factor.order][:, factor.order].double()
    mean = ordered.diagonal().mean()
    assert torch.equal(upper, upper.triu())
    damped = ordered / mean + 0.05 * torch.eye(64)
    assert bool(((upper @ upper.t() - damped).abs() < 1e-5 * damped.abs().max()).all())
    falling = ordered.diagonal()
    assert ordering == "none" or bool((falling[:-1] >= falling[1:]).all())


def test_damping_rises_until_the_factorization_succeeds() -> None:
    # Eigenvalues -0.05 and 2.05 around a mean diagonal of 1: 0.01 is too little, 0.1 enough.
    hessian = torch.eye(64)
    hessian[0, 1] = hessian[1, 0] = 1.05
    result = quantize(random_weight(4, 64, seed=0), grid_of(), hessian, GptqSettings())
    assert result.damp_percent == pytest.approx(0.1)
    assert result.escalations == 1


def test_what_is_no_hessian_is_refused() -> None:
    weight, hessian = random_weight(4, 64, seed=0), torch.eye(64)
    hessian[0, 1] = hessian[1, 0] = 1e7
    with pytest.raises(QconvError, match="not positive semidefinite"):
        quantize(weight, grid_of(), hessian, GptqSettings())
    hessian[0, 1] = torch.nan
    with pytest.raises(QconvError, match="Hessian holds values that are not finite"):
        quantize(weight, grid_of(), hessian, GptqSettings())
    weight[1, 2] = torch.inf
    with pytest.raises(QconvError, match="weight holds values that are not finite"):
        quantize(weight, grid_of(), torch.eye(64), GptqSettings())


def test_settings_out_of_range_are_named() -> None:
    for key, values in {"block_size": (0,), "damp_percent": (0.0, 1.5), "ordering": ("random",)}.items():
        for value in values:
            with pytest.raises(RecipeError, match=f"gptq.{key}: "):
                parse_recipe({"gptq": {key: value}})
    with pytest.raises(UsageError, match="does not divide"):
        quantize(torch.zeros(4, 48), grid_of(), torch.eye(48), GptqSettings())


@given(rows=st.integers(1, 5), columns=st.sampled_from([1, 7, 512, 513, 1100]), seed=st.integers(0, 10**6))
def test_row_errors_are_the_quadratic_form(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    delta, inputs = (torch.randn(count, columns, generator=generator) for count in (rows, 9))
    hessian = (inputs.double().t() @ inputs.double()).float()
    expected = true_errors(delta, torch.zeros_like(delta), hessian)
    assert bool(((row_errors(delta, hessian) - expected).abs() <= rounding_noise(delta, hessian)).all())
