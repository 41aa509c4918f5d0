"""Block FP8 against its definition: Qwen's config, and tensors that multiply out element by element."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qconv.artifacts.layout import quantization_section
from qconv.core.qtensor import CHANNEL, Grid
from qconv.core.settings import GridSettings
from qconv.errors import CheckpointError, RecipeError
from qconv.formats import detect, formats, get_format
from qconv.formats.fp8 import FORMAT
from tests.conftest import GRIDS, random_float_qtensor

GRID = Grid(8, 128, True, torch.float32, number="e4m3", block_rows=128, activations="dynamic")


def test_the_config_is_as_qwen_publishes_it() -> None:
    layers = range(2)
    linears = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in layers for expert in range(3)]
    routers = [f"model.layers.{layer}.mlp.gate" for layer in layers]
    section = FORMAT.config({GRID: linears}, [*routers, "lm_head"])
    assert section == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": [
            "lm_head",
            "model.layers.0.input_layernorm",
            "model.layers.0.mlp.gate",
            "model.layers.0.post_attention_layernorm",
            "model.layers.1.input_layernorm",
            "model.layers.1.mlp.gate",
            "model.layers.1.post_attention_layernorm",
        ],
    }
    described = FORMAT.read_config(section, torch.bfloat16)
    assert (described.grid, list(described.skipped)) == (GRID, section["modules_to_not_convert"])


def test_skipped_experts_are_also_named_as_transformers_fuses_them() -> None:
    skipped = ["model.layers.10.mlp.experts.0.up_proj", "model.layers.10.mlp.experts.1.up_proj", "lm_head"]
    listed = FORMAT.config({GRID: ["model.layers.10.self_attn.q_proj"]}, skipped)["modules_to_not_convert"]
    assert "model.layers.10.mlp.experts" in listed
    assert set(skipped) <= set(listed)
    assert not FORMAT.is_skipped("model.layers.10.self_attn.q_proj", listed)


def test_layers_without_a_quantized_linear_and_modules_outside_of_layers_are_listed_too() -> None:
    skipped = ["model.layers.0.self_attn.q_proj", "visual.proj", "lm_head"]
    listed = FORMAT.config({GRID: ["model.layers.1.self_attn.q_proj"]}, skipped)["modules_to_not_convert"]
    assert {*skipped, "model.layers.0.input_layernorm", "model.layers.1.input_layernorm"} <= set(listed)
    assert len(set(listed)) == len(listed)


@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 9),
    block_rows=st.integers(1, 4),
    group_size=st.integers(1, 4),
    scale_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 10**6),
)
def test_a_reader_that_follows_the_definition_gets_our_weight(
    rows: int, columns: int, block_rows: int, group_size: int, scale_dtype: torch.dtype, seed: int
) -> None:
    grid = Grid(8, group_size, True, scale_dtype, number="e4m3", block_rows=block_rows, activations="dynamic")
    weight = random_float_qtensor(grid, rows, columns, seed)
    tensors = dict(FORMAT.pack("m", weight))
    assert [(spec.name, spec.dtype, spec.shape) for spec in FORMAT.specs("m", rows, columns, grid)] == [
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    ]
    assert list(tensors) == ["m.weight", "m.weight_scale_inv"]
    codes, scales, dense = tensors["m.weight"], tensors["m.weight_scale_inv"], weight.dequantize()
    for row in range(rows):
        for column in range(columns):
            expected = float(codes[row, column]) * float(scales[row // block_rows, column // group_size])
            assert float(dense[row, column]) == torch.tensor(expected, dtype=torch.float32)
    # Whatever dtype the config's reader expects: the file's own counts.
    asked = Grid(8, group_size, True, torch.float32, number="e4m3", block_rows=block_rows, activations="dynamic")
    back = FORMAT.unpack("m", (rows, columns), tensors.__getitem__, asked)
    assert back.grid == grid
    assert torch.equal(back.codes.view(torch.uint8), weight.codes.view(torch.uint8))
    assert torch.equal(back.dequantize(), dense)


DAMAGES: list[tuple[str, Any]] = [
    ("m.weight", lambda tensor: tensor[:-1]),
    ("m.weight", lambda tensor: tensor.t()),
    ("m.weight", lambda tensor: tensor.view(torch.uint8)),
    ("m.weight", lambda tensor: tensor.to(torch.bfloat16)),
    ("m.weight", lambda tensor: tensor.float().to(torch.float8_e5m2)),
    ("m.weight_scale_inv", lambda tensor: tensor[:1]),
    ("m.weight_scale_inv", lambda tensor: tensor.t()),
    ("m.weight_scale_inv", lambda tensor: tensor.view(-1)),
    ("m.weight_scale_inv", lambda tensor: tensor.double()),
    ("m.weight_scale_inv", lambda tensor: tensor.to(torch.float8_e4m3fn)),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_misshapen_tensor_is_named(name: str, damage: Any) -> None:
    tensors = dict(FORMAT.pack("m", random_float_qtensor(GRID, 200, 300, 0)))
    assert tensors["m.weight_scale_inv"].shape == (2, 3)
    tensors[name] = damage(tensors[name])
    with pytest.raises(CheckpointError, match=rf"{name}: torch\.\w+ \["):
        FORMAT.unpack("m", (200, 300), tensors.__getitem__, GRID)


def test_a_missing_scale_is_the_readers_error() -> None:
    tensors: dict[str, Tensor] = dict(FORMAT.pack("m", random_float_qtensor(GRID, 8, 8, 0)))
    del tensors["m.weight_scale_inv"]
    with pytest.raises(KeyError, match="weight_scale_inv"):
        FORMAT.unpack("m", (8, 8), tensors.__getitem__, GRID)


def test_the_grid_is_one_of_blocks_of_128() -> None:
    assert FORMAT.grid(GridSettings(bits=8), torch.bfloat16) == GRID
    assert FORMAT.grid(GridSettings(bits=8, symmetric=True), torch.float16) == GRID
    for settings, key in (
        (GridSettings(bits=4), "bits"),
        (GridSettings(bits=8, group_size=64), "group_size"),
        (GridSettings(bits=8, group_size=CHANNEL), "group_size"),
        (GridSettings(bits=8, symmetric=False), "symmetric"),
    ):
        with pytest.raises(RecipeError, match=rf"^grid\.{key}: the fp8 format"):
            FORMAT.grid(settings, torch.bfloat16)


def test_ragged_shapes_fit() -> None:
    assert FORMAT.check(1, 129, GRID) is None


def test_a_module_is_skipped_with_what_it_is_a_part_of_and_not_by_its_beginning() -> None:
    skipped = ["model.layers.1.mlp.gate", "model.layers.2"]
    assert FORMAT.is_skipped("model.layers.1.mlp.gate", skipped)
    assert not FORMAT.is_skipped("model.layers.1.mlp.gate_proj", skipped)
    assert FORMAT.is_skipped("model.layers.2.mlp.gate_proj", skipped)
    assert not FORMAT.is_skipped("model.layers.21.mlp.gate_proj", skipped)


BROKEN: list[dict[str, Any]] = [
    {"fmt": "e5m2"},
    {"activation_scheme": "static"},
    {"weight_block_size": None},
    {"weight_block_size": 128},
    {"weight_block_size": [128]},
    {"weight_block_size": [128, 0]},
    {"weight_block_size": [128, "128"]},
    {"weight_block_size": [128, -1]},
    {"modules_to_not_convert": "lm_head"},
    {"modules_to_not_convert": [1]},
]


@pytest.mark.parametrize("change", BROKEN)
def test_sections_that_are_not_ours_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        FORMAT.read_config(FORMAT.config({GRID: []}, []) | change, torch.bfloat16)


def test_published_sections_that_say_less_or_other_blocks_are_read() -> None:
    described = FORMAT.read_config({"quant_method": "fp8", "weight_block_size": [64, 32]}, torch.bfloat16)
    grid, skipped = described.grid, described.skipped
    # Without a list transformers leaves the head alone.
    assert (grid.block_rows, grid.group_size, grid.scale_dtype, list(skipped)) == (64, 32, torch.float32, ["lm_head"])


@pytest.mark.parametrize("name", formats())
def test_every_section_belongs_to_one_format(name: str, tmp_path: Path) -> None:
    output_format = get_format(name)
    grid = output_format.grid(GridSettings(**GRIDS.get(name, {})), torch.bfloat16)
    config = output_format.keys(output_format.config({grid: []}, ["lm_head"]))
    section = quantization_section(tmp_path, config)
    assert section is not None
    assert [other for other in formats() if get_format(other).recognizes(section)] == [name]
    assert detect({"quantization_config": section}) is output_format
