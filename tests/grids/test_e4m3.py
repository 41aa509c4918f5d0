"""Rounding to E4M3 against the format's definition in float64, code by code and block by block."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qconv.core import rounding
from qconv.core.qtensor import CHANNEL, Grid
from qconv.core.settings import ClipSettings
from qconv.grids.e4m3 import activation_scale, quantize, scale_ratios
from qconv.grids.nearest import E4M3 as E4M3_FLOATS

E4M3 = torch.float8_e4m3fn
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CLIP = ClipSettings(steps=6, max_shrink=0.5)


def grid(block_rows: int, group_size: int, scale_dtype: torch.dtype = F32) -> Grid:
    return Grid(8, group_size, True, scale_dtype, number="e4m3", block_rows=block_rows, activations="dynamic")


BLOCKS = grid(3, 4)
ROWS = grid(1, CHANNEL)
WHOLE = grid(CHANNEL, CHANNEL)


def value_of(code: int) -> float:
    """What the specification says that a code stands for: 4 bits of exponent with bias 7, 3 of fraction, one NaN."""
    sign, exponent, fraction = -1.0 if code & 0x80 else 1.0, (code >> 3) & 15, code & 7
    if exponent == 15 and fraction == 7:
        return math.nan
    return sign * (fraction * 2.0**-9 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


POSITIVE = [value_of(code) for code in range(0x7F)]


def nearest(value: float) -> float:
    """The E4M3 number nearest to a value of at most 448; of two equally near ones that of the even code."""
    magnitude = min(range(0x7F), key=lambda code: (abs(POSITIVE[code] - abs(value)), code & 1))
    return math.copysign(POSITIVE[magnitude], value)


def codes_of(row: Tensor) -> Tensor:
    """The numbers that a row becomes whose scale is 1: 448 stands before it."""
    weight = quantize(torch.cat([torch.tensor([448.0]), row])[None], ROWS)
    assert float(weight.scales) == 1.0
    return weight.codes[0, 1:]


def test_every_code_stands_for_what_the_specification_says() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    assert torch.equal(codes.isnan(), torch.tensor([math.isnan(value_of(code)) for code in range(256)]))
    finite = [code for code in range(256) if not math.isnan(value_of(code))]
    assert codes[finite].tolist() == [value_of(code) for code in finite]


def test_every_code_is_rounded_to_itself() -> None:
    finite = [code for code in range(256) if not math.isnan(value_of(code))]
    numbers = torch.tensor([value_of(code) for code in finite])
    assert codes_of(numbers).view(torch.uint8).tolist() == finite  # the sign of zero included
    assert torch.equal(E4M3_FLOATS(numbers.clone()), numbers)


def test_midpoints_go_to_the_even_neighbour_and_what_lies_beside_them_to_the_nearer() -> None:
    # A midpoint of two E4M3 numbers has five significant bits: float32 holds it, and its neighbours, exactly.
    midpoints = torch.tensor([(low + high) / 2 for low, high in itertools.pairwise(POSITIVE)])
    beside = [torch.nextafter(midpoints, torch.tensor(end)) for end in (0.0, math.inf)]
    values = torch.cat([midpoints, *beside])
    values = torch.cat([values, -values])
    expected = torch.tensor([nearest(value) for value in values.tolist()])
    assert torch.equal(codes_of(values).float(), expected)
    assert torch.equal(E4M3_FLOATS(values.clone()), expected)


@given(st.lists(st.floats(-448.0, 448.0, width=32), min_size=1, max_size=20))
def test_any_number_is_rounded_to_the_nearest(values: list[float]) -> None:
    expected = torch.tensor([nearest(value) for value in values])
    assert torch.equal(codes_of(torch.tensor(values)).float(), expected)
    assert torch.equal(E4M3_FLOATS(torch.tensor(values)), expected)


def heavy_tailed(seed: int, rows: int, columns: int) -> Tensor:
    """Weights over many powers of two."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) ** 5


GRIDS = st.builds(
    grid,
    st.sampled_from([1, 2, 3, CHANNEL]),
    st.sampled_from([1, 3, 4, CHANNEL]),
    st.sampled_from([F32, BF16, F16]),
)


def by_block(values: Tensor, one: Grid) -> list[list[Tensor]]:
    """The blocks that share a scale, as rows of blocks."""
    rows, columns = values.shape
    tall = rows if one.block_rows == CHANNEL else one.block_rows
    wide = columns if one.group_size == CHANNEL else one.group_size
    return [
        [values[top : top + tall, left : left + wide] for left in range(0, columns, wide)]
        for top in range(0, rows, tall)
    ]


@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 9), GRIDS)
def test_each_block_has_its_largest_weight_at_448_and_the_others_nearest(
    seed: int, rows: int, columns: int, one: Grid
) -> None:
    weight = heavy_tailed(seed, rows, columns)
    made = quantize(weight, one)
    assert made.scales.dtype == one.scale_dtype
    assert made.scales.shape == one.scale_shape(rows, columns)
    for down, bands in enumerate(zip(by_block(weight, one), by_block(made.codes, one), strict=True)):
        for across, (block, codes) in enumerate(zip(*bands, strict=True)):
            scale = made.scales[down, across]
            smallest = torch.finfo(one.scale_dtype).smallest_normal
            assert scale == (block.abs().max() / 448).clamp(min=smallest).to(one.scale_dtype)
            quotients = (block / scale.float()).clamp(-448, 448)
            expected = [[nearest(value) for value in row] for row in quotients.tolist()]
            assert codes.float().tolist() == expected


def test_a_scale_rounded_down_saturates_and_never_gives_nan() -> None:
    # 448 * (1 + 2**-9) over 448 is just below half a step above 1 in bfloat16, which keeps 8 bits: it becomes 1.
    largest = 448.0 * (1 + 2.0**-9)
    made = quantize(torch.tensor([[largest, -largest, 1.0]]), grid(1, CHANNEL, BF16))
    assert float(made.scales) == 1.0
    assert made.codes.view(torch.uint8).tolist() == [[0x7E, 0xFE, 0x38]]
    # float16 ends at 65504: what is larger saturates, at any position of torch's vectors and in the rest behind them.
    made = quantize(torch.full((1, 77), 1e9), grid(1, CHANNEL, F16))
    assert float(made.scales) == 65504.0
    assert bool((made.codes.view(torch.uint8) == 0x7E).all())
    assert bool((quantize(torch.full((1, 77), 1e9), grid(1, CHANNEL, F16), CLIP).codes.float() == 448.0).all())


@pytest.mark.parametrize("clip", [None, CLIP])
@pytest.mark.parametrize("one", [BLOCKS, ROWS, WHOLE], ids=["blocks", "rows", "whole"])
def test_zeros_have_scale_one(one: Grid, clip: ClipSettings | None) -> None:
    made = quantize(torch.zeros(5, 6), one, clip)
    assert bool((made.scales == 1.0).all())
    assert made.dequantize().count_nonzero() == 0


@pytest.mark.parametrize("scale_dtype", [F32, BF16, F16])
@pytest.mark.parametrize("clip", [None, CLIP])
def test_the_least_and_the_largest_weights_have_normal_scales(
    scale_dtype: torch.dtype, clip: ClipSettings | None
) -> None:
    limits = torch.finfo(scale_dtype)
    for magnitude in (torch.finfo(F32).tiny, torch.finfo(F32).max):
        made = quantize(torch.tensor([[magnitude, -magnitude / 2, 0.0]]), grid(1, CHANNEL, scale_dtype), clip)
        assert limits.smallest_normal <= float(made.scales) <= limits.max
        assert bool(made.dequantize().isfinite().all())


def squared_errors(weight: Tensor, dequantized: Tensor, one: Grid) -> Tensor:
    """By block, float64."""
    squares = (weight.double() - dequantized.double()).square()
    return torch.tensor([[float(block.sum()) for block in band] for band in by_block(squares, one)])


@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 9), GRIDS)
def test_a_search_takes_the_best_scale_that_is_tried_and_is_never_worse_than_none(
    seed: int, rows: int, columns: int, one: Grid
) -> None:
    weight = heavy_tailed(seed, rows, columns)
    searched = squared_errors(weight, quantize(weight, one, CLIP).dequantize(), one)
    plain = squared_errors(weight, quantize(weight, one).dequantize(), one)
    enough = 1 + 1e-5  # the search sums these few squares in float32
    assert bool((searched <= plain * enough).all())
    smallest = torch.finfo(one.scale_dtype).smallest_normal
    for down, band in enumerate(by_block(weight, one)):
        for across, block in enumerate(band):
            for ratio in scale_ratios(CLIP):
                scale = (block.abs().max() / 448 * ratio).clamp(min=smallest).to(one.scale_dtype).float()
                tried = (block / scale).clamp(-448, 448).to(E4M3).float() * scale
                assert searched[down, across] <= float((tried.double() - block.double()).square().sum()) * enough


def test_a_search_tries_an_octave_and_clips_nothing() -> None:
    assert scale_ratios(ClipSettings(steps=4, max_shrink=0.5)) == [1.0, 1.75, 1.5, 1.25]
    weight = heavy_tailed(0, 16, 64)
    made = quantize(weight, ROWS, CLIP)
    assert bool((made.scales.float() * 448.0 >= weight.abs().amax(1, keepdim=True) * (1 - 2.0**-22)).all())


def test_a_search_pays_most_where_few_weights_share_a_scale() -> None:
    # The rounding of a row depends on where its weights lie between powers of two. Over a large block that evens out.
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    gains = []
    for one in (ROWS, grid(128, 128)):
        plain, searched = (
            squared_errors(weight, quantize(weight, one, clip).dequantize(), WHOLE) for clip in (None, CLIP)
        )
        gains.append(10 * math.log10(float(plain / searched)))
    assert gains[0] > 0.3
    assert 0.0 <= gains[1] < gains[0] / 2


def test_a_tie_keeps_the_full_range() -> None:
    numbers = torch.tensor([[448.0, 32.0, -16.0, 0.5]]) * 2.0**-20
    made = quantize(numbers, ROWS, CLIP)
    assert float(made.scales) == 2.0**-20
    assert torch.equal(made.dequantize(), numbers)


def test_gaussian_weights_keep_31_decibels() -> None:
    # Steps of an eighth in each power of two: 10 log10(12 * 64 * E[x^2] / E[4^floor(log2 x)]), 31.5 dB for a gaussian.
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    for one in (grid(128, 128), ROWS, WHOLE):
        noise = squared_errors(weight, quantize(weight, one).dequantize(), WHOLE)
        assert 31.3 < 10 * math.log10(float(weight.double().square().sum() / noise)) < 31.8


@pytest.mark.parametrize("one", [BLOCKS, ROWS, WHOLE], ids=["blocks", "rows", "whole"])
@pytest.mark.parametrize("clip", [None, CLIP])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_the_weight_may_be_of_any_float_dtype_is_not_changed_and_parts_do_not_matter(
    dtype: torch.dtype, clip: ClipSettings | None, one: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(14, 10, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = weight.clone()
    whole = quantize(weight, one, clip)
    assert torch.equal(weight, before)
    assert torch.equal(whole.codes.view(torch.uint8), quantize(weight.float(), one, clip).codes.view(torch.uint8))
    monkeypatch.setattr(rounding, "_BLOCK_ELEMENTS", 40)  # four rows at a time, or three where blocks have three
    parts = quantize(weight, one, clip)
    assert torch.equal(parts.codes.view(torch.uint8), whole.codes.view(torch.uint8))
    assert torch.equal(parts.scales, whole.scales)


def test_the_scale_of_inputs_is_carried_along() -> None:
    one = Grid(8, CHANNEL, True, BF16, number="e4m3", block_rows=CHANNEL, activations="static")
    scale = activation_scale(torch.tensor(896.0, dtype=BF16))
    assert (scale.dtype, scale.shape, float(scale)) == (F32, (), 2.0)
    assert quantize(torch.ones(2, 2), one, None, scale).input_scale is scale
    assert float(activation_scale(torch.tensor(0.0))) == 1.0
