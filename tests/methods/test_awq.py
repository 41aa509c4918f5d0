"""AWQ's searches: they cannot lose by their own loss, and what they fold stays in range."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qconv.core import rounding
from qconv.core.qtensor import CHANNEL, Grid
from qconv.core.rounding import clip_ratios, round_to_nearest
from qconv.core.settings import ClipSettings
from qconv.methods.awq import (
    MAX_SCALE,
    candidate_scales,
    choose,
    nearest_power_of_two,
    output_clip_ratios,
)

CLIP = ClipSettings(steps=6, max_shrink=0.6)


@given(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-30, 1e30)), min_size=1, max_size=20),
    st.integers(2, 30),
)
def test_candidates_are_positive_bounded_and_start_with_the_identity(magnitudes: list[float], points: int) -> None:
    candidates = candidate_scales(torch.tensor(magnitudes), points)
    assert len(candidates) == points
    assert torch.equal(candidates[0], torch.ones(len(magnitudes)))
    order = torch.tensor(magnitudes).argsort()
    for scale in candidates:
        assert bool(torch.isfinite(scale).all())
        assert bool(((scale >= 1 / MAX_SCALE) & (scale <= MAX_SCALE)).all())
        # More activation, more scale; but equal powers differ in their last bits between lanes of a vector.
        assert bool((scale[order][1:] >= scale[order][:-1] * (1 - 1e-5)).all())
        # Scales are relative: what is folded into the norm is centred on 1.
        assert math.isclose(float(scale.max() * scale.min()), 1.0, rel_tol=1e-3)


def test_the_last_candidate_is_the_magnitude_itself() -> None:
    magnitude = torch.tensor([1.0, 2.0, 4.0])
    torch.testing.assert_close(candidate_scales(magnitude, 20)[-1], magnitude / 2.0)
    torch.testing.assert_close(candidate_scales(magnitude, 21)[10], (magnitude / 2.0).sqrt())


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_without_usable_magnitudes_every_candidate_is_the_identity(value: float) -> None:
    for scale in candidate_scales(torch.tensor([value, value]), 20):
        assert torch.equal(scale, torch.ones(2))


@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1e-35, 1e25, 3e38])
def test_extreme_magnitudes_give_no_nan(magnitude: float) -> None:
    for scale in candidate_scales(torch.tensor([0.0, magnitude / 2, magnitude]), 20):
        assert bool(torch.isfinite(scale).all())
        assert bool(((scale >= 1 / MAX_SCALE) & (scale <= MAX_SCALE)).all())


@given(st.lists(st.floats(1 / MAX_SCALE, MAX_SCALE), min_size=1, max_size=20))
def test_powers_of_two_are_the_nearest(values: list[float]) -> None:
    scale = torch.tensor(values)
    rounded = nearest_power_of_two(scale)
    mantissa, _ = torch.frexp(rounded)
    assert bool((mantissa == 0.5).all())
    ratio = rounded / scale
    assert bool(((ratio > 0.7071) & (ratio < 1.4143)).all())  # half an octave either way


LOSSES = st.lists(st.floats(0.0, 1e6) | st.sampled_from([math.nan, math.inf]), min_size=2, max_size=8)


@given(LOSSES)
def test_the_choice_is_strictly_better_than_the_identity_or_is_the_identity(losses: list[float]) -> None:
    choice = choose(losses)
    usable = [loss for loss in losses if not math.isnan(loss)]
    if choice.index == 0:
        assert math.isnan(losses[0]) or all(losses[0] <= loss for loss in usable)
    else:
        assert losses[choice.index] < losses[0]
        assert losses[choice.index] == min(usable)
        assert losses.index(losses[choice.index]) == choice.index  # of equals the one nearest to the identity
    assert choice.alpha == choice.index / (len(losses) - 1)


@pytest.mark.parametrize(
    ("losses", "index"),
    [
        ([1.0, 1.0, 1.0], 0),
        ([1.0, 1.0, 0.5], 2),
        ([1.0, math.nan, 2.0], 0),
        ([1.0, math.nan, 0.5], 2),
        ([math.nan, math.nan], 0),
        ([math.nan, 0.5], 0),  # where even plain rounding has no loss, nothing is comparable
        ([math.inf, 0.5], 1),
        ([0.0, 0.0], 0),
    ],
)
def test_ties_and_missing_losses_keep_plain_rounding(losses: list[float], index: int) -> None:
    assert choose(losses).index == index


def output_error(weight: Tensor, dequantized: Tensor, hessian: Tensor, groups: int) -> Tensor:
    """d^T H d by row and group, in float64, with H [in, in]'s blocks that belong to one group each."""
    rows, columns = weight.shape
    error = (dequantized.double() - weight.double()).view(rows, groups, -1)
    width = columns // groups
    blocks = [hessian[g * width : (g + 1) * width, g * width : (g + 1) * width] for g in range(groups)]
    return torch.stack([torch.einsum("ri,ij,rj->r", error[:, g], blocks[g], error[:, g]) for g in range(groups)], 1)


@given(
    seed=st.integers(0, 10**6),
    bits=st.integers(2, 4),
    symmetric=st.booleans(),
    group_size=st.sampled_from([16, 32, CHANNEL]),
    block=st.sampled_from([8, 16]),
)
def test_clipping_by_output_error_is_the_best_ratio_and_never_worse_than_none(
    seed: int, bits: int, symmetric: bool, group_size: int, block: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, columns, tokens = 5, 64, 40
    weight = torch.randn(rows, columns, generator=generator) ** 3
    inputs = torch.randn(tokens, columns, generator=generator) * torch.rand(columns, generator=generator) * 3
    grid = Grid(bits, group_size, symmetric, torch.float16)
    groups = grid.groups(columns)
    blocks = inputs.view(tokens, columns // block, block).transpose(0, 1)
    gram = blocks.transpose(1, 2) @ blocks / tokens
    # The Hessian that the search knows: its blocks on the diagonal, nothing between them.
    hessian = torch.zeros(columns, columns, dtype=torch.float64)
    for number, part in enumerate(gram):
        hessian[number * block : (number + 1) * block, number * block : (number + 1) * block] = part

    ratios = output_clip_ratios(weight, grid, gram, CLIP)
    assert ratios.shape == (rows, groups)
    chosen = output_error(weight, round_to_nearest(weight, grid, ratios).dequantize(), hessian, groups)
    for ratio in clip_ratios(CLIP):
        every = torch.full((rows, groups), ratio)
        other = output_error(weight, round_to_nearest(weight, grid, every).dequantize(), hessian, groups)
        assert bool((chosen <= other * (1 + 1e-4) + 1e-9).all())


def test_clipping_pays_where_the_large_weights_see_little() -> None:
    # Weight 0 of each group is an outlier whose input is almost silent: cutting it off frees the grid for the others.
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 32, generator=generator)
    weight[:, ::16] = 8.0
    silent = torch.ones(32)
    silent[::16] = 1e-3
    gram = torch.diag_embed(silent.square().view(2, 16))
    grid = Grid(4, 16, symmetric=True, scale_dtype=torch.float16)
    assert bool((output_clip_ratios(weight, grid, gram, CLIP) == clip_ratios(CLIP)[-1]).all())
    # And does not where they see everything.
    gram = torch.diag_embed((1.0 / silent).square().view(2, 16))
    assert bool((output_clip_ratios(weight, grid, gram, CLIP) > 0.8).all())


def test_without_activations_nothing_is_clipped() -> None:
    grid = Grid(4, 16, symmetric=True, scale_dtype=torch.float16)
    assert bool((output_clip_ratios(torch.randn(3, 32), grid, torch.zeros(2, 16, 16), CLIP) == 1.0).all())


def test_blocks_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(13, 32, generator=generator)
    inputs = torch.randn(2, 50, 16, generator=generator)
    gram = inputs.transpose(1, 2) @ inputs
    grid = Grid(2, 16, symmetric=False, scale_dtype=torch.float16)
    ratios = output_clip_ratios(weight, grid, gram, CLIP)
    assert len(set(ratios.flatten().tolist())) > 1, "otherwise rows could be exchanged unnoticed"
    monkeypatch.setattr(rounding, "_BLOCK_ELEMENTS", 4 * 32)
    assert torch.equal(output_clip_ratios(weight, grid, gram, CLIP), ratios)
