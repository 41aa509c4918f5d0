"""The arithmetic of the affine search, against squared errors that are summed up directly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qconv.grids.ggml import affine
from qconv.grids.ggml.affine import AffineGrid, Source
from qconv.grids.ggml.numeric import as_half, inverse_determinant, reciprocal

SUPER = AffineGrid(levels=7, top=15, spans=(0.5, 1.0))
SINGLE = AffineGrid(levels=7, top=None, spans=(0.5, 1.0))


def example(seed: int, weighted: bool, offset: float) -> tuple[Tensor, Tensor | None]:
    """Weights [16 elements, 4 sub-blocks, 8 blocks] around ``offset``, and importance."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(16, 4, 8, generator=generator) + offset
    return weights, torch.exp(2.0 * torch.randn(16, 4, 8, generator=generator)) if weighted else None


def loss(weights: Tensor, importance: Tensor | None, codes: Tensor, scale: Tensor, base: Tensor) -> Tensor:
    """float64 [sub-blocks, blocks]."""
    error = (weights.double() - scale.double() * codes.double() - base.double()).square()
    return (error if importance is None else error * importance.double()).sum(0)


CASES = given(seed=st.integers(0, 10**6), weighted=st.booleans(), offset=st.sampled_from([-30.0, 0.0, 30.0]))


@pytest.mark.parametrize("grid", [SUPER, SINGLE])
@CASES
def test_the_fit_is_the_least_loss_for_its_codes(grid: AffineGrid, seed: int, weighted: bool, offset: float) -> None:
    weights, importance = example(seed, weighted, offset)
    source = Source(weights.clone(), importance, grid)
    start, zero = source.range / 7.0, torch.zeros_like(source.range)
    codes = source.codes(start, zero)
    scale, base = source.fit(source.moments(start.unsqueeze(0), zero.unsqueeze(0)).pick(zero.long()))
    least = loss(weights, importance, codes, scale, base + source.low)
    if grid.top is not None:
        assert bool((base + source.low <= 1e-5 * source.low.abs() + 1e-6).all()), "no base of a super-block is positive"
    for by_scale, by_base in ((1.01, 0.0), (0.99, 0.0), (1.0, -0.01), (1.0, 0.01), (1.02, -0.05), (0.98, 0.05)):
        other_base = base + by_base
        if grid.top is not None:
            other_base = torch.minimum(other_base, -source.low)
        other = loss(weights, importance, codes, scale * by_scale, other_base + source.low)
        assert bool((least <= other * (1.0 + 1e-3) + 1e-6).all())


@CASES
def test_gains_are_differences_of_losses(seed: int, weighted: bool, offset: float) -> None:
    weights, importance = example(seed, weighted, offset)
    source = Source(weights.clone(), importance, SUPER)
    generator = torch.Generator().manual_seed(seed)
    scales = (source.range / 7.0).unsqueeze(0) * (0.5 + torch.rand(3, 4, 8, generator=generator))
    bases = scales * torch.randn(3, 4, 8, generator=generator)
    moments = source.moments(scales, bases)
    gains = source.gain(moments, scales, bases)
    nothing = loss(weights, importance, torch.zeros_like(weights), scales[0], source.low)
    for trial in range(3):
        codes = source.codes(scales[trial], bases[trial])
        expected = nothing - loss(weights, importance, codes, scales[trial], bases[trial] + source.low)
        torch.testing.assert_close(gains[trial].double(), expected, rtol=1e-4, atol=float(nothing.max()) * 1e-5)


@CASES
def test_refitting_a_super_block_never_loses_and_usually_wins(seed: int, weighted: bool, offset: float) -> None:
    weights, importance = example(seed, weighted, offset)
    source = Source(weights.clone(), importance, SUPER)
    generator = torch.Generator().manual_seed(seed)
    k = torch.randint(1, 16, (4, 8), generator=generator).float()
    m = torch.randint(0, 16, (4, 8), generator=generator).float()
    d, dmin = as_half(source.range.amax(0) / 100.0), as_half((-source.low).amax(0) / 15.0)
    codes = source.codes(d * k, -dmin * m - source.low)
    moments = source.moments((d * k).unsqueeze(0), (-dmin * m - source.low).unsqueeze(0)).pick(k.long() * 0)
    new_d, new_dmin = affine._refit(source, moments, k, m, d, dmin)
    before = loss(weights, importance, codes, d * k, -dmin * m).sum(0)
    after = loss(weights, importance, codes, new_d * k, -new_dmin * m).sum(0)
    assert bool((after <= before * (1.0 + 1e-4)).all())
    # Scales at random are never the best for their codes, unless nothing but the bound of a base matters.
    assert float(after.sum()) < 0.99 * float(before.sum())


def test_numbers_that_have_no_reciprocal_count_as_zero() -> None:
    values = torch.tensor([2.0, -4.0, 0.0, -0.0, 1e-45, torch.inf, torch.nan])
    assert reciprocal(values).tolist() == [0.5, -0.25, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_a_determinant_of_rounding_noise_has_no_inverse() -> None:
    product = torch.tensor([4.0, 4.0, 0.0, 1e30])
    subtrahend = torch.tensor([2.0, 4.0 * (1.0 - 1e-7), 0.0, 1e30])
    assert inverse_determinant(product, subtrahend).tolist() == [0.5, 0.0, 0.0, 0.0]


def test_scales_stay_finite_in_float16() -> None:
    assert as_half(torch.tensor([1e9, -1e9, 1e-9, 0.1])).tolist() == [65504.0, -65504.0, 0.0, 0.0999755859375]
