"""Codes that ggml's blocks hold as they are, against the gguf package's decoding, both ways."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qconv.core.qtensor import Grid, QTensor
from qconv.grids.ggml.block_types import GgmlType
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
    return QTensor(GRIDS[GgmlType.MXFP4], codes, scales, None)


def packed(made: QTensor, type: GgmlType) -> Tensor:
    assert misfit(made, type) is None
    return to_blocks(made, type)


def decoded(rows: Tensor, type: GgmlType) -> Tensor:
    return torch.from_numpy(dequantize(rows.numpy(), type.value).copy())


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("group_size", SIZES)
@pytest.mark.parametrize(
    ("bits", "type"),
    [(4, GgmlType.Q4_0), (8, GgmlType.Q8_0), (4, GgmlType.Q8_0), (2, GgmlType.Q4_0), (3, GgmlType.Q4_0)],
)
def test_symmetric_integers(bits: int, type: GgmlType, group_size: int) -> None:
    made = weight(bits, group_size)
    assert same_bits(decoded(packed(made, type), type), made.dequantize())


@pytest.mark.parametrize("group_size", SIZES)
def test_zero_points_become_bases(group_size: int) -> None:
    made = weight(4, group_size, symmetric=False)
    assert torch.equal(decoded(packed(made, GgmlType.Q4_1), GgmlType.Q4_1), made.dequantize())


def test_zero_points_in_the_middle_need_no_base() -> None:
    made = weight(4, 32, symmetric=False, zeros=(8, 8))
    assert same_bits(decoded(packed(made, GgmlType.Q4_0), GgmlType.Q4_0), made.dequantize())
    asymmetric = weight(8, 32, symmetric=False, zeros=(128, 128))
    assert same_bits(decoded(packed(asymmetric, GgmlType.Q8_0), GgmlType.Q8_0), asymmetric.dequantize())


@pytest.mark.parametrize("exponents", [(0, 3), (100, 140), (245, 250)])
def test_floats_of_four_bits(exponents: tuple[int, int]) -> None:
    made = floats(exponents=exponents)
    assert torch.equal(decoded(packed(made, GgmlType.MXFP4), GgmlType.MXFP4), made.dequantize())


@pytest.mark.parametrize("type", [GgmlType.Q4_0, GgmlType.Q8_0, GgmlType.MXFP4])
@given(seed=st.integers(0, 2**31))
def test_any_blocks_are_codes_and_scales(type: GgmlType, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 256, (3, 4, type.block_bytes), generator=made, dtype=torch.uint8)
    if type is GgmlType.MXFP4:
        rows[..., 0].clamp_(1, 250)
    else:
        rows[..., 1] &= 0b10111111  # neither infinite nor NaN
        if type is GgmlType.Q8_0:
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
        type is not GgmlType.Q4_0
    )


@given(seed=st.integers(0, 2**31), group_size=st.sampled_from(SIZES))
def test_bases_that_are_whole_steps_come_back(seed: int, group_size: int) -> None:
    made = weight(4, group_size, symmetric=False, seed=seed)
    found = from_blocks(packed(made, GgmlType.Q4_1), GgmlType.Q4_1)
    assert isinstance(found, QTensor)
    assert torch.equal(found.dequantize(), made.dequantize())


def test_blocks_of_zeros_have_a_scale_all_the_same() -> None:
    for type in (GgmlType.Q4_0, GgmlType.Q8_0):
        found = from_blocks(torch.zeros(2, 3 * type.block_bytes, dtype=torch.uint8), type)
        assert isinstance(found, QTensor)
        assert bool((found.scales > 0).all())
        assert not bool(found.dequantize().any())


def test_scales_that_are_no_numbers_are_told() -> None:
    rows = packed(weight(4, 32), GgmlType.Q4_0).clone()
    rows[0, :2] = torch.tensor([float("inf")], dtype=torch.float16).view(torch.uint8)
    assert from_blocks(rows, GgmlType.Q4_0) == "a scale of its blocks is not finite"


def test_bases_that_are_none_are_told() -> None:
    rows = packed(weight(4, 32, symmetric=False), GgmlType.Q4_1).clone()
    rows[0, 2:4] = torch.tensor([0.3], dtype=torch.float16).view(torch.uint8)
    assert from_blocks(rows, GgmlType.Q4_1) == "the bases of its blocks are no whole number of steps"


REFUSED: list[tuple[QTensor, GgmlType, str]] = [
    (weight(4, 16), GgmlType.Q4_0, "groups of 16"),
    (weight(8, 32), GgmlType.Q4_0, "whole numbers from -8 to 7"),
    (weight(8, 32), GgmlType.Q4_1, "4 bits"),
    (weight(4, 32, symmetric=False, zeros=(0, 3)), GgmlType.Q4_0, "whole numbers"),
    (weight(4, 32), GgmlType.MXFP4, "E2M1"),
    (floats(), GgmlType.Q4_0, "whole numbers"),
]


@pytest.mark.parametrize(("made", "type", "reason"), REFUSED)
def test_what_does_not_fit_is_told(made: QTensor, type: GgmlType, reason: str) -> None:
    found = misfit(made, type)
    assert found is not None
    assert reason in found


Kind = Literal["scales", "bases"]


@pytest.mark.parametrize(("kind", "type"), [("scales", GgmlType.Q4_0), ("bases", GgmlType.Q4_1)])
def test_numbers_beyond_float16_are_told(kind: Kind, type: GgmlType) -> None:
    made = weight(4, 32, symmetric=kind == "scales", scale_dtype=torch.float32)
    number = 1 + 2**-12 if kind == "scales" else 1 + 2**-10
    made.scales[0, 0] = number
    if made.zero_points is not None:
        made.zero_points[0, 0] = 15
    found = misfit(made, type)
    assert found is not None
    assert kind in found
