"""compressed-tensors' FP8 with dynamic activations: by row and in blocks."""

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
from qconv.formats.fp8_dynamic import FORMAT
from tests.conftest import random_float_qtensor

ROWS = Grid(8, CHANNEL, True, torch.bfloat16, number="e4m3", block_rows=1, activations="dynamic")
BLOCKS = Grid(8, 128, True, torch.bfloat16, number="e4m3", block_rows=128, activations="dynamic")


def test_the_group_size_chooses_rows_or_blocks() -> None:
    assert FORMAT.grid(GridSettings(bits=8, group_size=CHANNEL), torch.bfloat16) == ROWS
    assert FORMAT.grid(GridSettings(bits=8, group_size=128), torch.bfloat16) == BLOCKS
    assert FORMAT.grid(GridSettings(bits=8), torch.float16).scale_dtype == torch.float16
    for settings, key in (
        (GridSettings(bits=4), "bits"),
        (GridSettings(bits=8, group_size=64), "group_size"),
        (GridSettings(bits=8, symmetric=False), "symmetric"),
    ):
        with pytest.raises(RecipeError, match=rf"^grid\.{key}: the fp8_dynamic format"):
            FORMAT.grid(settings, torch.bfloat16)


@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    grid=st.sampled_from([ROWS, BLOCKS]),
    seed=st.integers(0, 10**6),
)
def test_what_is_packed_is_unpacked(rows: int, columns: int, grid: Grid, seed: int) -> None:
    weight = random_float_qtensor(grid, rows, columns, seed)
    tensors = dict(FORMAT.pack("m", weight))
    assert [(spec.name, spec.dtype, spec.shape) for spec in FORMAT.specs("m", rows, columns, grid)] == [
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    ]
    expected = (rows, 1) if grid is ROWS else (-(-rows // 128), -(-columns // 128))
    assert tensors["m.weight_scale"].shape == expected
    back = FORMAT.unpack("m", (rows, columns), tensors.__getitem__, grid)
    assert back.grid == grid
    assert torch.equal(back.dequantize(), weight.dequantize())


@pytest.mark.parametrize(("grid", "leaf"), [(ROWS, "weight"), (BLOCKS, "weight_scale"), (ROWS, "weight_scale")])
def test_a_misshapen_tensor_is_named(grid: Grid, leaf: str) -> None:
    tensors = dict(FORMAT.pack("m", random_float_qtensor(grid, 200, 200, 0)))
    tensors[f"m.{leaf}"] = tensors[f"m.{leaf}"][1:]
    with pytest.raises(CheckpointError, match=rf"m\.{leaf}: "):
        FORMAT.unpack("m", (200, 200), tensors.__getitem__, grid)


def test_the_config_is_as_compressed_tensors_presets_have_it() -> None:
    rows, blocks = (FORMAT.config({grid: []}, ["lm_head"])["config_groups"]["group_0"] for grid in (ROWS, BLOCKS))
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    # Its FP8_DYNAMIC and FP8_BLOCK.
    assert rows["weights"] == {**common, "dynamic": False, "strategy": "channel", "group_size": None}
    assert rows["input_activations"] == {**common, "dynamic": True, "strategy": "token", "group_size": None}
    assert blocks["weights"] == {
        **common,
        "dynamic": False,
        "strategy": "block",
        "group_size": None,
        "block_structure": [128, 128],
    }
    assert blocks["input_activations"] == {**common, "dynamic": True, "strategy": "group", "group_size": 128}
    section = FORMAT.config({ROWS: []}, ["lm_head"])
    assert (section["quant_method"], section["format"], section["ignore"]) == (
        "compressed-tensors",
        "float-quantized",
        ["lm_head"],
    )


@pytest.mark.parametrize("grid", [ROWS, BLOCKS], ids=["rows", "blocks"])
def test_the_config_round_trips_and_is_recognized(grid: Grid) -> None:
    section = FORMAT.config({grid: []}, ["model.layers.1.mlp.gate", "lm_head"])
    assert detect({"quantization_config": section}) is FORMAT
    described = FORMAT.read_config(section, torch.bfloat16)
    assert (described.grid, list(described.skipped)) == (grid, ["model.layers.1.mlp.gate", "lm_head"])


def test_one_scale_a_weight_with_inputs_by_token_is_read_too() -> None:
    section = FORMAT.config({ROWS: []}, [])
    section["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"
    grid = FORMAT.read_config(section, torch.bfloat16).grid
    assert (grid.block_rows, grid.group_size, grid.activations) == (CHANNEL, CHANNEL, "dynamic")
    assert FORMAT.specs("m", 5, 7, grid)[1].shape == (1,)


def test_skipping_matches_whole_names_or_expressions() -> None:
    assert FORMAT.is_skipped("model.layers.1.mlp.gate", ["model.layers.1.mlp.gate"])
    assert not FORMAT.is_skipped("model.layers.11.mlp.gate", ["model.layers.1.mlp.gate"])
    assert FORMAT.is_skipped("model.layers.1.mlp.gate", ["re:.*mlp.gate$"])
    assert not FORMAT.is_skipped("model.layers.1.mlp.gate_proj", ["re:.*mlp.gate$"])


BROKEN: list[tuple[str, dict[str, Any]]] = [
    ("weights", {"type": "int"}),
    ("weights", {"num_bits": 4}),
    ("weights", {"symmetric": False}),
    ("weights", {"strategy": "group", "group_size": 32}),
    ("weights", {"strategy": "block"}),
    ("weights", {"strategy": "block", "block_structure": [128]}),
    ("weights", {"strategy": "block", "block_structure": "128x128"}),
    ("weights", {"strategy": "block", "block_structure": [128, 128]}),  # with inputs by token
    ("input_activations", {"strategy": "tensor"}),
    ("input_activations", {"num_bits": 4}),
    ("input_activations", {"type": "int"}),
    ("input_activations", {"dynamic": "local"}),
    ("input_activations", {"symmetric": False}),
]


@pytest.mark.parametrize(("part", "change"), BROKEN)
def test_schemes_that_are_not_known_are_refused(part: str, change: dict[str, Any]) -> None:
    section = FORMAT.config({ROWS: []}, [])
    section["config_groups"]["group_0"][part] |= change
    assert detect({"quantization_config": section}) is FORMAT
    with pytest.raises(CheckpointError, match=r"config\.json: quantization_config is of an FP8 scheme"):
        FORMAT.read_config(section, torch.bfloat16)


@pytest.mark.parametrize(
    "groups",
    [None, {}, 5, {"a": None}, {"a": {}}, {"a": {"weights": 3}}, {"a": {}, "b": {}}],
    ids=str,
)
def test_sections_without_one_group_are_refused(groups: Any) -> None:
    section = FORMAT.config({ROWS: []}, []) | {"config_groups": groups}
    assert detect({"quantization_config": section}) is FORMAT
    with pytest.raises(CheckpointError, match=r"config\.json"):
        FORMAT.read_config(section, torch.bfloat16)


@pytest.mark.parametrize("ignore", [5, [5]])
def test_a_skip_list_of_something_else_is_refused(ignore: Any) -> None:
    with pytest.raises(CheckpointError, match="ignore is not a list of names"):
        FORMAT.read_config(FORMAT.config({ROWS: []}, []) | {"ignore": ignore}, torch.bfloat16)
