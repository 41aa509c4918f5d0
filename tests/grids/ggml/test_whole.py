"""Codes that ggml's blocks hold as they are, against the gguf package's decoding, both ways."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qconv.core.qtensor import Grid, QTensor
from qconv.grids.ggml.whole import GRIDS, from_blocks, has_negative_scales, misfit, to_blocks

SIZES = [32, 64, 128, -1]


def weight(
    bits: int,
    group_size: int,
    *,
    symmetric: bool = True,
    seed: int = 0,
    zeros: tuple[int, int] | None = None,
    scale_dtype: torch.dtype = torch.float16,
) -> QTensor:
    """A random one of [6, 256]; scales are float16 numbers with 5 bits, so that zero points times scales are, too."""
    made = torch.Generator().manual_seed(seed)
    grid = Grid(bits, group_size, symmetric, scale_dtype)
    groups = grid.groups(256)
    codes = torch.randint(0, 1 << bits, (6, 256), generator=made, dtype=torch.uint8)
    scales = torch.randint(1, 32, (6, groups), generator=made).float() / 256
    low, high = zeros or (0, (1 << bits) - 1)
    points = None if symmetric else torch.randint(low, high + 1, (6, groups), generator=made, dtype=torch.uint8)
    return QTensor(grid, codes, scales.to(scale_dtype), points)


def floats(seed: int = 0, exponents: tuple[int, int] = (100, 140)) -> QTensor:
    made = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (6, 256), generator=made, dtype=torch.uint8)
    scales = torch.randint(*exponents, (6, 8), generator=made, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    return QTensor(GRIDS[T.MXFP4], codes, scales, None)


def packed(made: QTensor, type: T) -> Tensor:
    assert misfit(made, type) is None
    return to_blocks(made, type)


def decoded(rows: Tensor, type: T) -> Tensor:
    return torch.from_numpy(dequantize(rows.numpy(), type).copy())


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("group_size", SIZES)
@pytest.mark.parametrize(
    ("bits", "type"),
    [
        (4, T.Q4_0),
        (8, T.Q8_0),
        (4, T.Q8_0),
        (2, T.Q4_0),
        (3, T.Q4_0),
    ],
)
def test_symmetric_integers(bits: int, type: T, group_size: int) -> None:
    made = weight(bits, group_size)
    assert same_bits(decoded(packed(made, type), type), made.dequantize())


@pytest.mark.parametrize("group_size", SIZES)
def test_zero_points_become_bases(group_size: int) -> None:
    made = weight(4, group_size, symmetric=False)
    assert torch.equal(decoded(packed(made, T.Q4_1), T.Q4_1), made.dequantize())


def test_zero_points_in_the_middle_need_no_base() -> None:
    made = weight(4, 32, symmetric=False, zeros=(8, 8))
    assert same_bits(decoded(packed(made, T.Q4_0), T.Q4_0), made.dequantize())
    asymmetric = weight(8, 32, symmetric=False, zeros=(128, 128))
    assert same_bits(decoded(packed(asymmetric, T.Q8_0), T.Q8_0), asymmetric.dequantize())


@pytest.mark.parametrize("exponents", [(0, 3), (100, 140), (245, 250)])
def test_floats_of_four_bits(exponents: tuple[int, int]) -> None:
    made = floats(exponents=exponents)
    assert torch.equal(decoded(packed(made, T.MXFP4), T.MXFP4), made.dequantize())


@pytest.mark.parametrize("type", [T.Q4_0, T.Q8_0, T.MXFP4])
@given(seed=st.integers(0, 2**31))
def test_any_blocks_are_codes_and_scales(type: T, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 256, (3, 4, GGML_QUANT_SIZES[type][1]), generator=made, dtype=torch.uint8)
    if type is T.MXFP4:
        rows[..., 0].clamp_(1, 250)
    else:
        rows[..., 1] &= 0b10111111  # neither infinite nor NaN
        if type is T.Q8_0:
            rows[..., 2:].clamp_(0, 127)
    rows = rows.view(3, -1)
    found = from_blocks(rows, type, signed=True)
    assert isinstance(found, QTensor)
    assert bool((found.steps() > 0).all())
    assert torch.equal(found.dequantize(), decoded(rows, type))
    assert torch.equal(decoded(packed(found, type), type), decoded(rows, type))
    again = from_blocks(packed(found, type), type, signed=True)
    assert isinstance(again, QTensor)
    assert torch.equal(again.codes, found.codes)
    assert has_negative_scales(rows, type) is (from_blocks(rows, type) == "some of its scales are negative") or (
        type is not T.Q4_0
    )


@given(seed=st.integers(0, 2**31), group_size=st.sampled_from(SIZES))
def test_bases_that_are_whole_steps_come_back(seed: int, group_size: int) -> None:
    made = weight(4, group_size, symmetric=False, seed=seed)
    found = from_blocks(packed(made, T.Q4_1), T.Q4_1)
    assert isinstance(found, QTensor)
    assert torch.equal(found.dequantize(), made.dequantize())


def test_blocks_of_zeros_have_a_scale_all_the_same() -> None:
    for type in (T.Q4_0, T.Q8_0):
        found = from_blocks(torch.zeros(2, 3 * GGML_QUANT_SIZES[type][1], dtype=torch.uint8), type)
        assert isinstance(found, QTensor)
        assert bool((found.scales > 0).all())
        assert not bool(found.dequantize().any())


def test_scales_that_are_no_numbers_are_told() -> None:
    rows = packed(weight(4, 32), T.Q4_0).clone()
    rows[0, :2] = torch.tensor([float("inf")], dtype=torch.float16).view(torch.uint8)
    assert from_blocks(rows, T.Q4_0) == "a scale of its blocks is not finite"


def test_bases_that_are_none_are_told() -> None:
    rows = packed(weight(4, 32, symmetric=False), T.Q4_1).clone()
    rows[0, 2:4] = torch.tensor([0.3], dtype=torch.float16).view(torch.uint8)
    assert from_blocks(rows, T.Q4_1) == "the bases of its blocks are no whole number of steps"


REFUSED: list[tuple[QTensor, T, str]] = [
    (weight(4, 16), T.Q4_0, "groups of 16"),
    (weight(8, 32), T.Q4_0, "whole numbers from -8 to 7"),
    (weight(8, 32), T.Q4_1, "4 bits"),
    (weight(4, 32, symmetric=False, zeros=(0, 3)), T.Q4_0, "whole numbers"),
    (weight(4, 32), T.MXFP4, "E2M1"),
    (floats(), T.Q4_0, "whole numbers"),
]


@pytest.mark.parametrize(("made", "type", "reason"), REFUSED)
def test_what_does_not_fit_is_told(made: QTensor, type: T, reason: str) -> None:
    found = misfit(made, type)
    assert found is not None
    assert reason in found


Kind = Literal["scales", "bases"]


@pytest.mark.parametrize(("kind", "type"), [("scales", T.Q4_0), ("bases", T.Q4_1)])
def test_numbers_beyond_float16_are_told(kind: Kind, type: T) -> None:
    made = weight(4, 32, symmetric=kind == "scales", scale_dtype=torch.float32)
    number = 1 + 2**-12 if kind == "scales" else 1 + 2**-10
    made.scales[0, 0] = number
    if made.zero_points is not None:
        made.zero_points[0, 0] = 15
    found = misfit(made, type)
    assert found is not None
    assert kind in found


def sixteens(seed: int = 0, global_scale: float = 1.0) -> QTensor:
    """NVFP4 of [6, 256] with every positive scale of E4M3 among them."""
    made = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (6, 256), generator=made, dtype=torch.uint8)
    scales = torch.randint(0, 0x7F, (6, 16), generator=made, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return QTensor(GRIDS[T.NVFP4], codes, scales, None, global_scale=global_scale)


@given(seed=st.integers(0, 10**6), exponent=st.integers(-20, 20))
def test_nvfp4_is_decoded_to_its_numbers_and_comes_back(seed: int, exponent: int) -> None:
    made = sixteens(seed, 2.0**exponent)
    rows = packed(made, T.NVFP4)
    assert rows.shape == (6, 4 * GGML_QUANT_SIZES[T.NVFP4][1])
    assert torch.equal(decoded(rows, T.NVFP4) * 2.0**exponent, made.dequantize())
    back = from_blocks(rows, T.NVFP4, global_scale=2.0**exponent)
    assert isinstance(back, QTensor)
    assert torch.equal(back.codes, made.codes)
    assert torch.equal(back.scales.view(torch.uint8), made.scales.view(torch.uint8))
    assert same_bits(back.dequantize(), made.dequantize())


def test_what_nvfp4_does_not_hold_is_told() -> None:
    assert misfit(sixteens(global_scale=float(torch.tensor(1 / 3))), T.NVFP4) is None
    assert "float32 are other numbers" in (misfit(sixteens(global_scale=1 / 3), T.NVFP4) or "")
    assert "for each 16 inputs" in (misfit(floats(), T.NVFP4) or "")
    narrow = sixteens()
    narrow = QTensor(narrow.grid, narrow.codes[:, :48], narrow.scales[:, :3], None)
    assert "blocks of 64 do not divide its 48 input features" in (misfit(narrow, T.NVFP4) or "")
    turned = (-sixteens().scales.float()).to(torch.float8_e4m3fn)
    negative = QTensor(narrow.grid, sixteens().codes, turned, None)
    assert "not negative" in (misfit(negative, T.NVFP4) or "")
    rows = packed(sixteens(), T.NVFP4)
    rows[2, 1] = 0x7F
    assert "no positive number" in str(from_blocks(rows, T.NVFP4))
