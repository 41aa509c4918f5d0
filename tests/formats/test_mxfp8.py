"""MXFP8 in files: E4M3 codes with powers of two as scales of 32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qconv.core.qtensor import QTensor
from qconv.core.rounding import powers_of_two
from qconv.core.settings import GridSettings
from qconv.errors import CheckpointError, RecipeError
from qconv.formats import detect
from qconv.formats.float8 import MXFP8
from qconv.formats.mxfp8 import FORMAT
from qconv.grids import e4m3
from tests.conftest import random_float_qtensor


def made(rows: int, columns: int, seed: int) -> QTensor:
    weight = random_float_qtensor(replace(MXFP8, scale_dtype=torch.float32), rows, columns, seed)
    return replace(weight, grid=MXFP8, scales=powers_of_two(weight.scales))


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 10**6))
def test_what_is_packed_comes_back(rows: int, groups: int, seed: int) -> None:
    weight = made(rows, 32 * groups, seed)
    tensors = dict(FORMAT.pack("m", weight))
    assert [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()] == [
        ("m.weight", torch.float8_e4m3fn, (rows, 32 * groups)),
        ("m.weight_scale", torch.uint8, (rows, groups)),
    ]
    back = FORMAT.unpack("m", (rows, 32 * groups), tensors.__getitem__, MXFP8)
    steps = torch.exp2(tensors["m.weight_scale"].double() - 127.0).repeat_interleave(32, 1)
    assert torch.equal(back.dequantize().double(), weight.codes.double() * steps)


@given(st.integers(-120, 120), st.integers(0, 10**6))
def test_no_weight_is_cut_off_and_none_half_as_large_would_be(power: int, seed: int) -> None:
    weight = torch.randn(4, 96, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    scales = e4m3.quantize(weight, MXFP8).scales.double()
    largest = weight.double().view(4, 3, 32).abs().amax(2)
    assert bool((largest <= 448.0 * scales).all())
    assert bool((largest > 224.0 * scales).all() or power < -110)


def test_powers_of_two_are_the_least_that_reach() -> None:
    given_ones = torch.tensor([1.0, 1.0001, 2.0, 3.0, 0.0, 2.0**-126, 1e-44, 3e38])
    assert powers_of_two(given_ones).float().tolist() == [1.0, 2.0, 2.0, 4.0, 1.0, 2.0**-126, 2.0**-126, 2.0**127]


@pytest.mark.parametrize("activations", ["dynamic", "none"])
def test_the_config_round_trips(activations: str) -> None:
    grid = MXFP8 if activations == "dynamic" else replace(MXFP8, activations="none")
    section = FORMAT.config({grid: []}, ["lm_head"])
    assert detect({"quantization_config": section}) is FORMAT
    assert FORMAT.read_config(section, torch.bfloat16).grid == grid


def test_other_schemes_are_refused() -> None:
    for part, change in (("weights", {"group_size": 64}), ("input_activations", {"dynamic": False})):
        section = FORMAT.config({MXFP8: []}, [])
        section["config_groups"]["group_0"][part] |= change
        with pytest.raises(CheckpointError, match="MXFP8 scheme that is not known"):
            FORMAT.read_config(section, torch.bfloat16)


def test_recipes_can_ask_for_nothing_else() -> None:
    assert FORMAT.grid(GridSettings(bits=8, group_size=32), torch.float16) == MXFP8
    for settings, key in (
        (GridSettings(bits=4, group_size=32), "bits"),
        (GridSettings(bits=8, group_size=-1), "group_size"),
        (GridSettings(bits=8, group_size=32, symmetric=False), "symmetric"),
    ):
        with pytest.raises(RecipeError, match=rf"^grid\.{key}: "):
            FORMAT.grid(settings, torch.bfloat16)
    assert FORMAT.check(8, 40, MXFP8) == "groups of 32 do not divide its 40 input features"
