"""compressed-tensors' int-quantized W8A8: the layout against its definition, and what config.json says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qconv.core.qtensor import CHANNEL, Grid
from qconv.core.settings import GridSettings
from qconv.errors import CheckpointError, RecipeError
from qconv.formats import detect
from qconv.formats.packed import whole_numbers
from qconv.formats.w8a8 import FORMAT
from tests.conftest import random_qtensor

GRID = whole_numbers(Grid(8, CHANNEL, True, torch.bfloat16, activations="dynamic", activation_number="int"))
ROWS = Grid(8, CHANNEL, True, torch.bfloat16, "e4m3", 1, activations="dynamic")


def test_the_grid_is_one_scale_a_row() -> None:
    assert FORMAT.grid(GridSettings(bits=8, group_size=CHANNEL), torch.bfloat16) == GRID
    for settings, key in (
        (GridSettings(bits=4, group_size=CHANNEL), "bits"),
        (GridSettings(bits=8, group_size=128), "group_size"),
        (GridSettings(bits=8, group_size=CHANNEL, symmetric=False), "symmetric"),
    ):
        with pytest.raises(RecipeError, match=rf"^grid\.{key}: the w8a8 format"):
            FORMAT.grid(settings, torch.bfloat16)
    assert FORMAT.grid(GridSettings(bits=8, group_size=CHANNEL), torch.bfloat16, "e4m3") == ROWS


@given(rows=st.integers(1, 9), words=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_a_reader_that_follows_the_definition_gets_our_weight(rows: int, words: int, seed: int) -> None:
    weight = random_qtensor(GRID, rows, 4 * words, seed)
    tensors = dict(FORMAT.pack("m", weight))
    assert [(spec.name, spec.dtype, spec.shape) for spec in FORMAT.specs("m", rows, 4 * words, GRID)] == [
        ("m.weight", torch.int8, (rows, 4 * words)),
        ("m.weight_scale", torch.bfloat16, (rows, 1)),
    ]
    assert torch.equal(tensors["m.weight"].float() * tensors["m.weight_scale"].float(), weight.dequantize())
    back = FORMAT.unpack("m", (rows, 4 * words), tensors.__getitem__, GRID)
    assert back.grid == GRID
    assert torch.equal(back.codes, weight.codes)
    tensors["m.weight"] = tensors["m.weight"].view(torch.uint8)
    with pytest.raises(CheckpointError, match=r"m\.weight: torch\.uint8"):
        FORMAT.unpack("m", (rows, 4 * words), tensors.__getitem__, GRID)


def test_config_json_says_what_engines_round() -> None:
    section = FORMAT.config({GRID: []}, ["lm_head"])
    (group,) = section["config_groups"].values()
    assert section["format"] == group["format"] == "int-quantized"
    common = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None}
    assert group["weights"] == {**common, "strategy": "channel", "dynamic": False}
    assert group["input_activations"] == {**common, "strategy": "token", "dynamic": True}
    assert detect({"quantization_config": section}) is FORMAT
    described = FORMAT.read_config(section, torch.bfloat16)
    assert (described.grid, described.skipped) == (GRID, ("lm_head",))


@pytest.mark.parametrize("inputs", [None, {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}, 3])
def test_other_int_quantized_weights_are_read_and_called_so(inputs: Any) -> None:
    section = FORMAT.config({GRID: []}, [])
    section["config_groups"]["group_0"]["input_activations"] = inputs
    found = detect({"quantization_config": section})
    assert found is not None
    assert found.name == "int_quantized"
    assert found.read_config(section, torch.bfloat16).grid.activations == "none"


def test_four_bits_in_eight_are_read_and_a_larger_number_is_refused() -> None:
    grid = whole_numbers(Grid(4, 32, True, torch.bfloat16, activations="dynamic"))
    section = FORMAT.config({grid: []}, [])
    found = detect({"quantization_config": section})
    assert found is not None
    assert (found.name, found.read_config(section, torch.bfloat16).grid) == ("int_quantized", grid)
    weight = random_qtensor(grid, 5, 64, 0)
    tensors = dict(found.pack("m", weight))
    assert (int(tensors["m.weight"].min()), int(tensors["m.weight"].max())) == (-8, 7)
    assert torch.equal(found.unpack("m", (5, 64), tensors.__getitem__, grid).codes, weight.codes)
    tensors["m.weight"][3, 4] = 8
    with pytest.raises(CheckpointError, match=r"m\.weight: holds a number of more than 4 bits"):
        found.unpack("m", (5, 64), tensors.__getitem__, grid)


def test_floats_go_beside_it_by_rules() -> None:
    section = FORMAT.config({GRID: ["model.layers.0.mlp.up_proj"], ROWS: ["model.layers.0.self_attn.q_proj"]}, [])
    assert section["format"] == "mixed-precision"
    found = detect({"quantization_config": section})
    assert found is not None
    assert [group.grid for group in found.read_config(section, torch.bfloat16).groups] == [GRID, ROWS]
