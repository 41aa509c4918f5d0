"""The formulas that leave nothing to search: the nearest value of each block's own grid, and the documented cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf.quants import MXFP4
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qconv.grids.ggml import GgmlType, encode
from tests.grids.ggml.conftest import NEARLY_EXACT, SPREAD, blocks_of_256, decode

# Levels below, and levels between the lowest and the highest value, in steps.
ROUNDED = {"Q8_0": 127, "Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31}


@pytest.mark.parametrize("name", ROUNDED)
@given(weight=blocks_of_256(SPREAD + NEARLY_EXACT, -2, 4))
def test_every_weight_is_within_half_a_step(name: str, weight: Tensor) -> None:
    type, levels = GgmlType[name], ROUNDED[name]
    error = (decode(encode(weight, type), type) - weight).double().abs().view(-1, 32)
    blocks = weight.double().view(-1, 32)
    affine = name.endswith("_1")
    step = (blocks.amax(1) - blocks.amin(1) if affine else blocks.abs().amax(1)) / levels
    # The side away from the largest magnitude has one level less: a weight of the same size is cut by a whole step.
    steps = 1.0 if name in ("Q4_0", "Q5_0") else 0.5
    # Codes are chosen for the scale before it is rounded to float16 (11 bits), as ggml does; so is the base.
    largest = blocks.abs().amax(1)
    slack = largest * 2.0**-10 + levels * 2.0**-24
    assert bool((error.amax(1) <= steps * step * 1.0001 + slack).all())


def test_the_formulas_on_a_block_that_can_be_checked_by_hand() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :5] = torch.tensor([-8.0, 7.0, 3.4, -0.6, 0.5])
    codes = encode(weight, GgmlType.Q4_0)[0]
    assert codes[:2].view(torch.float16).item() == 1.0
    # floor(x + 8.5): -8 -> 0, 7 -> 15, 3.4 -> 11, -0.6 -> 7, 0.5 -> 9; the high nibbles hold zeros: 8.
    assert (codes[2:7] & 15).tolist() == [0, 15, 11, 7, 9]
    assert (codes[2:] >> 4).tolist() == [8] * 16

    weight *= 127.0 / 8.0
    codes = encode(weight, GgmlType.Q8_0)[0]
    assert codes[:2].view(torch.float16).item() == 1.0
    assert codes[2:5].view(torch.int8).tolist() == [-127, 111, 54]  # 111.125, 53.975


@pytest.mark.parametrize(
    ("value", "code"), [(0.5, 1), (-0.5, -1), (2.5, 3), (-2.5, -3), (0.49999997, 0), (1.4999999, 1)]
)
def test_q8_0_rounds_halves_away_from_zero(value: float, code: int) -> None:
    weight = torch.zeros(1, 32)
    weight[0, 0], weight[0, 1] = 127.0, value
    assert encode(weight, GgmlType.Q8_0)[0, 3].view(torch.int8).item() == code


@pytest.mark.parametrize(("first", "scale"), [(1.0, -0.125), (-1.0, 0.125)])
def test_of_two_largest_magnitudes_the_first_gives_the_sign(first: float, scale: float) -> None:
    weight = torch.full((3, 32), 0.1)
    weight[:, 9], weight[:, 4] = -first, first
    encoded = encode(weight, GgmlType.Q4_0)
    assert encoded[:, :2].view(torch.float16).tolist() == [[scale]] * 3


@given(seed=st.integers(0, 10**6), exponent=st.integers(-30, 30), ties=st.booleans())
def test_mxfp4_takes_the_nearest_value_and_the_smaller_of_two(seed: int, exponent: int, ties: bool) -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if ties:
        weight = torch.round(weight * 4.0) / 4.0
    weight = (weight * 2.0**exponent).float()
    encoded = encode(weight, GgmlType.MXFP4)
    # OCP MX: the largest power of two in the block over that of the largest element (4 = 2^2).
    scale = 2.0 ** (np.floor(np.log2(np.abs(weight.double().numpy()).max(1, keepdims=True))) - 2.0)
    assert np.array_equal(encoded[:, :1].numpy() - 127.0, np.log2(scale))
    values = scale[..., None] * np.array(MXFP4.kvalues) / 2.0
    distance = np.abs(weight.double().numpy()[..., None] - values)
    decoded = decode(encoded, GgmlType.MXFP4).double().numpy()
    nearest = distance.min(-1)
    assert np.array_equal(np.abs(weight.double().numpy() - decoded), nearest)
    smallest = np.where(distance == nearest[..., None], np.abs(values), np.inf).min(-1)
    assert np.array_equal(np.abs(decoded), smallest)


@pytest.mark.parametrize("type", [GgmlType.F32, GgmlType.F16, GgmlType.BF16], ids=lambda type: type.name)
@given(weight=blocks_of_256(SPREAD + NEARLY_EXACT, -46, 4))
def test_floats_are_rounded_to_nearest_even(type: GgmlType, weight: Tensor) -> None:
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[type.name]
    assert torch.equal(encode(weight, type).view(dtype), weight.to(dtype))
    assert torch.equal(decode(encode(weight, type), type), weight.to(dtype).float())
