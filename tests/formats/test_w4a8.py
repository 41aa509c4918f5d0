"""compressed-tensors' W4AFP8: pack-quantized weights whose inputs engines round to E4M3."""

from __future__ import annotations

import pytest
import torch

from qconv.core.qtensor import CHANNEL, Grid
from qconv.core.settings import GridSettings
from qconv.errors import RecipeError
from qconv.formats import detect, get_format
from qconv.formats.w4a8 import FORMAT
from tests.conftest import random_qtensor

GRID = Grid(4, 128, True, torch.bfloat16, activations="dynamic", activation_number="e4m3")
PLAIN = Grid(4, 128, True, torch.bfloat16)


def test_the_grid_is_of_groups_of_128() -> None:
    assert FORMAT.grid(GridSettings(), torch.bfloat16) == GRID
    for settings, key in (
        (GridSettings(bits=8), "bits"),
        (GridSettings(group_size=64), "group_size"),
        (GridSettings(group_size=CHANNEL), "group_size"),
        (GridSettings(symmetric=False), "symmetric"),
    ):
        with pytest.raises(RecipeError, match=rf"^grid\.{key}: the w4a8 format"):
            FORMAT.grid(settings, torch.bfloat16)
    with pytest.raises(RecipeError) as refused:
        FORMAT.grid(GridSettings(group_size=64), torch.bfloat16)
    assert "SGLang" in str(refused.value)
    assert "--fmt w4a16" in str(refused.value.hint)
    assert FORMAT.grid(GridSettings(bits=8, group_size=128), torch.bfloat16, "e4m3").block_rows == 128


def test_the_weights_are_those_of_w4a16() -> None:
    ours, plain = (random_qtensor(grid, 24, 256, 3) for grid in (GRID, PLAIN))
    found, expected = dict(FORMAT.pack("m", ours)), dict(get_format("w4a16").pack("m", plain))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    back = FORMAT.unpack("m", (24, 256), found.__getitem__, GRID)
    assert torch.equal(back.dequantize(), plain.dequantize())


def test_config_json_says_what_engines_round() -> None:
    section = FORMAT.config({GRID: []}, ["lm_head"])
    (group,) = section["config_groups"].values()
    assert section["format"] == group["format"] == "pack-quantized"
    common = {"symmetric": True, "dynamic": False}
    assert group["weights"] == {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, **common}
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    assert group["input_activations"] == inputs | {"group_size": None}
    assert detect({"quantization_config": section}) is FORMAT
    assert FORMAT.read_config(section, torch.bfloat16).grid == GRID
    group["input_activations"] = None
    assert detect({"quantization_config": section}) is get_format("w4a16")


def test_some_linears_with_rounded_inputs_are_a_mixture_of_w4a16() -> None:
    names = {GRID: ["model.layers.0.mlp.up_proj"], PLAIN: ["model.layers.0.self_attn.q_proj"]}
    section = FORMAT.config(names, [])
    found = detect({"quantization_config": section})
    assert found is get_format("w4a16")
    assert [group.grid for group in found.read_config(section, torch.bfloat16).groups] == [GRID, PLAIN]
