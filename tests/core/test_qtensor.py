"""Grids and quantized tensors: sizes, and what codes stand for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qconv.core.qtensor import CHANNEL, Grid, QTensor, SquaredError
from qconv.errors import UsageError

F16 = torch.float16


def test_a_group_that_does_not_divide_is_an_error_with_sizes_that_do() -> None:
    grid = Grid(4, 128, symmetric=True, scale_dtype=F16)
    assert (grid.groups(256), grid.width(256)) == (2, 128)
    with pytest.raises(UsageError, match="group size 128 does not divide 320") as caught:
        grid.groups(320)
    assert caught.value.hint is not None
    assert "32, 64." in caught.value.hint
    with pytest.raises(UsageError) as caught:
        grid.groups(100)  # 100 has no divisor that a kernel knows
    assert "per channel" in str(caught.value)


def test_one_scale_a_row() -> None:
    grid = Grid(8, CHANNEL, symmetric=True, scale_dtype=F16)
    assert (grid.groups(77), grid.width(77)) == (1, 77)


E4M3 = torch.float8_e4m3fn


@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 9),
    block_rows=st.sampled_from([CHANNEL, 1, 2, 3]),
    group_size=st.sampled_from([CHANNEL, 2, 4]),
)
def test_float_blocks_may_be_ragged(rows: int, columns: int, block_rows: int, group_size: int) -> None:
    grid = Grid(8, group_size, True, torch.float32, number="e4m3", block_rows=block_rows)
    down, across = grid.scale_shape(rows, columns)
    codes = torch.arange(1, rows * columns + 1).view(rows, columns).float().to(E4M3)
    scales = torch.arange(1, down * across + 1).view(down, across).float()
    weight = QTensor(grid, codes, scales, None)
    dense = weight.dequantize()
    tall = rows if block_rows == CHANNEL else block_rows
    wide = columns if group_size == CHANNEL else group_size
    assert scales.shape == (math.ceil(rows / tall), math.ceil(columns / wide))
    for row in range(rows):
        for column in range(columns):
            assert dense[row, column] == codes[row, column].float() * scales[row // tall, column // wide]
    for start in range(0, rows, tall):
        assert torch.equal(weight.rows(start, rows).dequantize(), dense[start:])


@pytest.mark.parametrize("symmetric", [True, False])
def test_act_order_takes_each_inputs_group_from_its_index(symmetric: bool) -> None:
    grid = Grid(4, 2, symmetric, F16, act_order=True)
    zeros = None if symmetric else torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)
    codes = torch.tensor([[9, 10, 11, 12], [13, 14, 15, 0]], dtype=torch.uint8)
    scales = torch.tensor([[1.0, 10.0], [100.0, 1000.0]]).half()
    weight = QTensor(grid, codes, scales, zeros, torch.tensor([1, 0, 0, 1], dtype=torch.int32))
    expected = [[10, 2, 3, 40], [5000, 600, 700, -8000]] if symmetric else [[70, 9, 10, 100], [9000, 1100, 1200, -4000]]
    assert weight.dequantize().tolist() == expected
    assert weight.rows(1, 2).dequantize().tolist() == expected[1:]


@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    rows=st.integers(2, 4),
    groups=st.integers(1, 3),
    width=st.integers(1, 5),
    seed=st.integers(0, 10**6),
)
def test_dequantize_is_code_minus_zero_times_scale(
    bits: int, symmetric: bool, rows: int, groups: int, width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, groups * width), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 1 << bits, (rows, groups), generator=generator, dtype=torch.uint8)
    scales = torch.rand(rows, groups, generator=generator).half()
    weight = QTensor(Grid(bits, width, symmetric, F16), codes, scales, None if symmetric else zeros)
    assert weight.shape == (rows, groups * width)
    dense = weight.dequantize()
    for row in range(rows):
        for column in range(groups * width):
            group = column // width
            zero = (1 << bits) // 2 if symmetric else int(zeros[row, group])
            assert float(dense[row, column]) == (int(codes[row, column]) - zero) * float(scales[row, group])
    assert torch.equal(weight.dequantize(torch.bfloat16), dense.bfloat16())
    assert torch.equal(weight.rows(1, rows).dequantize(), dense[1:])


def test_squared_errors_add_up_over_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    reference, approximation = torch.randn(2, 6, 8, generator=generator).double()
    noise = float((reference - approximation).square().sum())
    whole = SquaredError.between_(reference, approximation.clone())
    first, second = (
        SquaredError.between_(reference[rows], approximation[rows].clone()) for rows in (slice(2), slice(2, 6))
    )
    assert math.isclose(whole.signal, (first + second).signal)
    assert math.isclose(whole.noise, (first + second).noise)
    assert math.isclose(whole.noise, noise)


def test_decibels() -> None:
    assert SquaredError(100.0, 1.0).snr_db == 20.0
    assert SquaredError(1.0, 0.0).snr_db == math.inf
    assert SquaredError(0.0, 0.0).snr_db == math.inf  # zeros copied exactly
    assert SquaredError(0.0, 1.0).snr_db == -math.inf
