"""compressed-tensors' FP8 with static activations: one scale a weight and one for its inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qconv.core.qtensor import CHANNEL, Grid
from qconv.core.settings import GridSettings
from qconv.errors import CheckpointError, RecipeError
from qconv.formats import detect
from qconv.formats.fp8_static import FORMAT
from tests.conftest import random_float_qtensor

GRID = Grid(8, CHANNEL, True, torch.bfloat16, number="e4m3", block_rows=CHANNEL, activations="static")


def test_the_grid_has_one_scale() -> None:
    assert FORMAT.grid(GridSettings(bits=8, group_size=CHANNEL), torch.bfloat16) == GRID
    for settings, key in (
        (GridSettings(bits=4, group_size=CHANNEL), "bits"),
        (GridSettings(bits=8), "group_size"),
        (GridSettings(bits=8, group_size=CHANNEL, symmetric=False), "symmetric"),
    ):
        with pytest.raises(RecipeError, match=rf"^grid\.{key}: the fp8_static format"):
            FORMAT.grid(settings, torch.bfloat16)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
def test_scales_have_one_dimension_as_compressed_tensors_has_them(rows: int, columns: int, seed: int) -> None:
    weight = random_float_qtensor(GRID, rows, columns, seed)
    tensors = dict(FORMAT.pack("m", weight))
    assert [(spec.name, spec.dtype, spec.shape) for spec in FORMAT.specs("m", rows, columns, GRID)] == [
        ("m.weight", torch.float8_e4m3fn, (rows, columns)),
        ("m.weight_scale", torch.bfloat16, (1,)),
        ("m.input_scale", torch.float32, (1,)),
    ]
    assert [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()] == [
        (spec.name, spec.dtype, spec.shape) for spec in FORMAT.specs("m", rows, columns, GRID)
    ]
    back = FORMAT.unpack("m", (rows, columns), tensors.__getitem__, GRID)
    assert torch.equal(back.dequantize(), weight.dequantize())
    assert back.input_scale is not None
    assert weight.input_scale is not None
    assert (back.input_scale.dtype, back.input_scale.shape) == (torch.float32, ())
    assert torch.equal(back.input_scale, weight.input_scale)


def test_input_scales_of_other_dtypes_are_read() -> None:
    tensors = dict(FORMAT.pack("m", random_float_qtensor(GRID, 4, 4, 0)))
    tensors["m.input_scale"] = torch.tensor([0.5], dtype=torch.bfloat16)
    back = FORMAT.unpack("m", (4, 4), tensors.__getitem__, GRID)
    assert back.input_scale is not None
    assert (back.input_scale.dtype, float(back.input_scale)) == (torch.float32, 0.5)


@pytest.mark.parametrize("leaf", ["weight", "weight_scale", "input_scale"])
def test_a_misshapen_tensor_is_named(leaf: str) -> None:
    tensors = dict(FORMAT.pack("m", random_float_qtensor(GRID, 4, 4, 0)))
    tensors[f"m.{leaf}"] = torch.cat([tensors[f"m.{leaf}"]] * 2)
    with pytest.raises(CheckpointError, match=rf"m\.{leaf}: "):
        FORMAT.unpack("m", (4, 4), tensors.__getitem__, GRID)


def test_a_weight_without_an_input_scale_is_not_written() -> None:
    weight = replace(random_float_qtensor(GRID, 4, 4, 0), input_scale=None)
    with pytest.raises(ValueError, match="m: static activations need an input scale"):
        dict(FORMAT.pack("m", weight))


def test_the_config_is_compressed_tensors_own_preset_and_round_trips() -> None:
    section = FORMAT.config({GRID: []}, ["lm_head"])
    group = section["config_groups"]["group_0"]
    # Its FP8, but for the observer, of which nothing is left once a model is quantized.
    expected = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "dynamic": False,
        "strategy": "tensor",
        "group_size": None,
    }
    assert (group["weights"], group["input_activations"]) == (expected, expected)
    assert detect({"quantization_config": section}) is FORMAT
    described = FORMAT.read_config(section, torch.bfloat16)
    assert (described.grid, list(described.skipped)) == (GRID, ["lm_head"])


def test_rows_with_static_inputs_are_read_too() -> None:
    section = FORMAT.config({GRID: []}, [])
    section["config_groups"]["group_0"]["weights"]["strategy"] = "channel"
    grid = FORMAT.read_config(section, torch.bfloat16).grid
    assert (grid.block_rows, grid.group_size, grid.activations) == (1, CHANNEL, "static")
    assert [spec.shape for spec in FORMAT.specs("m", 5, 7, grid)] == [(5, 7), (5, 1), (1,)]
