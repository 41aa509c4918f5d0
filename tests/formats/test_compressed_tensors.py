"""Config groups: linears on different grids, told apart by targets that no reader can rank otherwise."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qconv.core.qtensor import CHANNEL, Grid
from qconv.errors import CheckpointError
from qconv.formats import detect, get_format, mixing_formats
from qconv.formats.base import Described, Group
from qconv.formats.compressed_tensors import MIXED_PRECISION

FORMAT = get_format("w4a16")
INT4 = Grid(4, 32, symmetric=True, scale_dtype=torch.bfloat16)
INT8 = Grid(8, CHANNEL, symmetric=True, scale_dtype=torch.bfloat16)
ZERO_POINTS = Grid(4, 128, symmetric=False, scale_dtype=torch.bfloat16)
ROWS = Grid(8, CHANNEL, True, torch.bfloat16, "e4m3", 1, activations="dynamic")
BLOCKS = Grid(8, 128, True, torch.bfloat16, "e4m3", 128, activations="dynamic")
GRIDS = (INT4, INT8, ZERO_POINTS, ROWS, BLOCKS)
ROUTER = "model.layers.0.mlp.gate"
CALLED = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.shared_expert.gate_proj", "mlp.experts.{}.w1")


def linears(layer: int) -> dict[str, list[str]]:
    """The linears of a layer by what they are called; experts are of one kind."""
    return {called: [f"model.layers.{layer}.{called.format(e)}" for e in (0, 1, 11)] for called in CALLED}


@given(st.lists(st.lists(st.sampled_from(GRIDS), min_size=5, max_size=5), min_size=1, max_size=12))
def test_any_assignment_comes_back_by_targets_that_exclude_each_other(grids: list[list[Grid]]) -> None:
    wanted = {
        name: grid
        for layer, of_layer in enumerate(grids)
        for names, grid in zip(linears(layer).values(), of_layer, strict=True)
        for name in names
    }
    quantized: dict[Grid, list[str]] = {}
    for name, grid in wanted.items():
        quantized.setdefault(grid, []).append(name)
    section = FORMAT.config(quantized, [ROUTER, "lm_head"])
    found = detect({"quantization_config": section})
    assert found is not None
    described = found.read_config(section, torch.bfloat16)
    assert [group.grid for group in described.groups] == list(quantized)
    assert described.grids(wanted) == wanted
    assert described.skipped == (ROUTER, "lm_head")
    if len(quantized) == 1:
        return
    # Readers that take the first target, or the last, or sort them, find the same one: only one fits.
    targets = [target.removeprefix("re:") for group in described.groups for target in group.targets]
    for name in wanted:
        assert sum(re.match(target, name) is not None for target in targets) == 1, name
    assert described.grids([ROUTER, "lm_head", "model.layers.0.mlp.experts"]) == {}


def test_groups_of_one_layout_keep_its_name_and_others_are_called_mixed() -> None:
    names = {INT4: ["model.layers.0.mlp.experts.0.up_proj"], INT8: ["model.layers.0.self_attn.q_proj"]}
    section = FORMAT.config(names, [])
    assert section["format"] == "pack-quantized"
    assert detect({"quantization_config": section}) is FORMAT
    mixed = FORMAT.config({INT4: names[INT4], ROWS: names[INT8]}, [])
    assert mixed["format"] == MIXED_PRECISION
    groups = mixed["config_groups"]
    assert [group["format"] for group in groups.values()] == ["pack-quantized", "float-quantized"]
    assert [group["targets"] for group in groups.values()] == [
        [r"re:.*\.mlp\.experts\.\d+\.up_proj$"],
        [r"re:.*\.self_attn\.q_proj$"],
    ]
    assert [group["input_activations"] is None for group in groups.values()] == [True, False]


def test_layers_are_listed_only_where_they_differ() -> None:
    names = {
        INT4: ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "model.layers.0.mlp.down_proj"],
        INT8: ["model.layers.10.mlp.up_proj", "model.layers.2.mlp.up_proj"],
    }
    groups = FORMAT.config(names, [])["config_groups"].values()
    assert [group["targets"] for group in groups] == [
        [r"re:.*\.layers\.(0|1)\.mlp\.up_proj$", r"re:.*\.mlp\.down_proj$"],
        [r"re:.*\.layers\.(10|2)\.mlp\.up_proj$"],
    ]


def test_one_grid_targets_every_linear() -> None:
    (group,) = FORMAT.config({INT4: ["model.layers.0.mlp.up_proj"]}, [])["config_groups"].values()
    assert group["targets"] == ["Linear"]


def test_a_name_goes_before_an_expression_and_that_before_the_class() -> None:
    described = Described(
        (Group(INT4), Group(INT8, ("re:.*up_proj$", "a.down_proj")), Group(ROWS, ("a.up_proj", "re:.*proj$"))), ()
    )
    # Of two expressions the first by its text: "re:.*proj$".
    assert described.grids(["a.up_proj", "b.up_proj", "a.down_proj", "b.gate"]) == {
        "a.up_proj": ROWS,
        "b.up_proj": ROWS,
        "a.down_proj": INT8,
        "b.gate": INT4,
    }


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"format": "mxfp6-pack-quantized"}, "of groups of format 'mxfp6-pack-quantized'"),
    ({"format": None}, "of groups of format None"),
    ({"weights": None}, "a group that describes no weights"),
    ({"weights": {"num_bits": 3, "strategy": "group", "group_size": 32}}, "3-bit int"),
    ({"targets": ["re:(?P<name>x)"]}, "no regular expression that is read"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN, ids=lambda value: str(value)[:40])
def test_a_group_that_is_not_read_is_refused(change: dict[str, Any], message: str) -> None:
    section = FORMAT.config({INT4: ["model.layers.0.mlp.up_proj"], ROWS: ["model.layers.0.mlp.down_proj"]}, [])
    section["config_groups"]["group_0"] |= change
    found = detect({"quantization_config": section})
    assert found is not None
    with pytest.raises(CheckpointError, match=re.escape(message)):
        found.read_config(section, torch.bfloat16)


def test_which_formats_mix() -> None:
    assert mixing_formats() == [
        "fp8_dynamic",
        "mlx",
        "mxfp4",
        "mxfp8",
        "nvfp4",
        "nvfp4_w4a4",
        "w4a16",
        "w4a8",
        "w4afp8",
        "w8a8",
    ]
