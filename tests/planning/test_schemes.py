"""Rules: every linear gets one scheme, what engines fuse agrees, and what a format cannot hold is refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from qconv.core.architecture import Architecture
from qconv.core.qtensor import CHANNEL, Grid
from qconv.errors import RecipeError
from qconv.planning.plan import BuildPlan, make_plan
from qconv.planning.recipe import parse_recipe
from qconv.planning.topology import topology_group_sizes, topology_problems
from tests.conftest import small_recipe
from tests.planning.test_plan import model, told

INT4 = Grid(4, 32, symmetric=True, scale_dtype=torch.bfloat16)
ROWS = Grid(8, CHANNEL, True, torch.bfloat16, "e4m3", 1, activations="dynamic")


def plan(described: Architecture, rules: list[dict[str, Any]], **changes: Any) -> BuildPlan:
    return make_plan(described, small_recipe(rules=rules, **changes), lambda name: torch.bfloat16)


def test_the_first_rule_that_fits_counts_and_skip_before_all() -> None:
    rules: list[dict[str, Any]] = [
        {"match": "layers.0.self_attn.*", "grid": "int8"},
        {"match": "self_attn.o_proj", "grid": "fp8-channel", "method": "rtn"},
        {"match": "self_attn.[qkv]_proj", "grid": {"group_size": 64, "symmetric": False}},
        {"match": "layers.1.mlp.experts.*", "grid": "skip"},
    ]
    planned = plan(model("qwen3_moe"), rules, skip=["*.layers.0.self_attn.o_proj"])
    grids = {name.removeprefix("model.layers."): scheme.grid for name, scheme in planned.schemes.items()}
    assert grids["0.self_attn.q_proj"] == Grid(8, 32, True, torch.bfloat16)
    assert "0.self_attn.o_proj" not in grids
    assert grids["1.self_attn.o_proj"] == ROWS
    assert grids["1.self_attn.k_proj"] == Grid(4, 64, False, torch.bfloat16)
    assert grids["0.mlp.experts.3.up_proj"] == INT4
    assert not [name for name in grids if name.startswith("1.mlp")]
    assert {name for name in planned.skipped if "experts" in name} == {
        f"model.layers.1.mlp.experts.{e}.{name}_proj" for e in range(6) for name in ("gate", "up", "down")
    }
    quantized = [linear.name for linear in planned.quantized]
    assert list(planned.schemes) == quantized
    assert sorted(name for names in planned.grids().values() for name in names) == sorted(quantized)


def test_a_method_of_its_own_leaves_the_rest_to_the_recipes() -> None:
    planned = plan(model("llama"), [{"match": "down_proj", "method": "gptq"}])
    methods = {name.rpartition(".")[2]: scheme.method for name, scheme in planned.schemes.items()}
    assert methods["down_proj"] == ("gptq",)
    assert methods["up_proj"] == ("rtn",)
    assert planned.needs_calibration
    assert planned.method_name == "rtn, gptq"
    assert not plan(model("llama"), [{"match": "down_proj", "grid": "int8"}]).needs_calibration


def test_what_is_written_is_counted_by_each_linears_own_grid() -> None:
    described = model("llama")
    mixed = plan(described, [{"match": "self_attn.*", "grid": "int8"}])
    alone = [plan(described, []), plan(described, [], grid={"bits": 8})]
    sizes = [{item.module.name: sum(spec.nbytes for spec in item.specs) for item in one.items()} for one in alone]
    for item in mixed.items():
        expected = sizes["self_attn" in item.module.name][item.module.name]
        assert sum(spec.nbytes for spec in item.specs) == expected, item.module.name
    assert mixed.scheme == "8 linears 8 bits in groups of 32; 6 linears 4 bits in groups of 32"


FUSED: list[tuple[str, list[dict[str, Any]], str]] = [
    ("qwen3_moe", [{"match": "q_proj", "grid": "int8"}], "q, k and v of layer 0"),
    ("qwen3_moe", [{"match": "layers.1.self_attn.v_proj", "grid": "int4-g64"}], "q, k and v of layer 1"),
    ("qwen3_moe", [{"match": "experts.3.*", "grid": "int8"}], "the experts of layer 0"),
    ("qwen3_moe", [{"match": "experts.*.down_proj", "grid": "fp8-channel"}], "the experts of layer 0"),
    ("qwen2_moe", [{"match": "shared_expert.up_proj", "grid": "int8"}], "the shared expert's gate and up of layer 0"),
    ("llama", [{"match": "gate_proj", "grid": "int8"}], "gate and up of layer 0"),
    ("llama", [{"match": "gate_proj", "grid": "skip"}], "gate and up of layer 0"),
]


@pytest.mark.parametrize(("model_type", "rules", "what"), FUSED, ids=lambda value: str(value)[:60])
def test_what_engines_fuse_must_agree(model_type: str, rules: list[dict[str, Any]], what: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(what)) as caught:
        plan(model(model_type), rules)
    assert caught.value.exit_code == 2
    assert re.search(r"model\.layers\.\d", caught.value.message)


def test_what_engines_fuse_may_differ_from_the_rest() -> None:
    rules = [{"match": "[qkv]_proj", "grid": "int8"}, {"match": "shared_expert.down_proj", "grid": "int4-g64"}]
    assert len(plan(model("qwen2_moe"), rules).grids()) == 3


ATTENTION = "self_attn.*"
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"format": "awq"}, {"match": ATTENTION, "grid": "int4-g64"}, "format awq holds one grid"),
    ({"format": "gptq"}, {"match": ATTENTION, "grid": "int8"}, "format gptq holds one grid"),
    ({"format": "awq"}, {"match": ATTENTION, "grid": "int8"}, "the awq format holds 4 bits, not 8"),
    ({"format": "awq"}, {"match": ATTENTION, "grid": "fp8-channel"}, "the awq format holds integers alone"),
    ({"format": "gptq"}, {"match": ATTENTION, "grid": "fp8-block"}, "the gptq format holds integers alone"),
    (
        {"format": "fp8", "grid": {"bits": 8, "group_size": 128}},
        {"match": ATTENTION, "grid": "int8"},
        "the fp8 format holds E4M3 floats alone",
    ),
    (
        {"format": "fp8_static", "grid": {"bits": 8, "group_size": -1}},
        {"match": ATTENTION, "grid": "int4-g32"},
        "the fp8_static format holds E4M3 floats alone",
    ),
    ({"format": "w4a16"}, {"match": ATTENTION, "grid": "int3"}, "4 or 8 bits, not 3"),
    ({"format": "w4a16"}, {"match": ATTENTION, "grid": {"number": "e4m3", "group_size": 64}}, "blocks of 128, not"),
]


@pytest.mark.parametrize(("recipe", "rule", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_format_refuses_what_it_cannot_hold_and_tells_which_can(
    recipe: dict[str, Any], rule: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        plan(model("llama"), [rule], **recipe)
    assert caught.value.exit_code == 2
    assert caught.value.message.startswith("rules: ")
    assert "model.layers.0.self_attn.q_proj" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("output_format", ["awq", "gptq", "fp8"])
def test_formats_of_one_grid_take_rules_that_skip_or_name_a_method(output_format: str) -> None:
    floats = {"grid": {"bits": 8, "group_size": 128}} if output_format == "fp8" else {}
    rules = [{"match": "self_attn.*", "grid": "skip"}, {"match": "mlp.*", "method": "gptq"}]
    sizes = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 128}
    planned = plan(model("llama", **sizes), rules, format=output_format, **floats)
    assert {scheme.method for scheme in planned.schemes.values()} == {("gptq",)}
    assert len(planned.grids()) == 1


FAULTS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"match": "nothing", "grid": "int8"}, "rules: 'nothing' matches no linear of the model."),
    ({}, {"match": "mlp.gate", "grid": "int8"}, "rules: 'mlp.gate' matches no linear of the model that is quantized."),
    ({}, {"match": "lm_head", "grid": "int8"}, "rules: 'lm_head' matches no linear of the model that is quantized."),
    ({}, {"match": "nothing", "grid": "skip"}, "rules: 'nothing' matches no module of the model."),
    ({}, {"match": "*", "grid": "skip"}, "skip: leaves no linear to quantize."),
    ({"method": "awq"}, {"match": ATTENTION, "grid": "fp8-channel"}, "rules: awq searches scales for integers, and"),
    ({}, {"match": "o_proj", "grid": "int4-g64"}, "grid.group_size: model.layers.0.self_attn.o_proj does not fit"),
    ({}, {"match": ATTENTION, "grid": "fp8-block"}, "does not fit blocks of 128 x 128"),
]


@pytest.mark.parametrize(("recipe", "rule", "message"), FAULTS, ids=lambda value: str(value)[:60])
def test_rules_that_cannot_be_followed(recipe: dict[str, Any], rule: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        plan(model("qwen3_moe"), [rule], **recipe)


def test_a_rule_may_skip_what_is_never_quantized() -> None:
    assert plan(model("qwen3_moe"), [{"match": "mlp.gate", "grid": "skip"}, {"match": "lm_head", "grid": "skip"}])


def test_a_method_for_floats_makes_them_go_with_awq() -> None:
    rules = [{"match": ATTENTION, "grid": "fp8-channel", "method": "gptq"}]
    planned = plan(model("qwen3_moe"), rules, method="awq")
    assert {scheme.method for scheme in planned.schemes.values()} == {("gptq",), ("awq",)}


def test_a_topology_is_checked_by_each_linears_own_groups() -> None:
    described = model("qwen3_moe", moe_intermediate_size=64)
    # o reads 96 inputs, 48 a rank: no whole groups of 32, but whole rows.
    assert len(topology_problems(plan(described, []), 2)) == 1
    rows = plan(described, [{"match": "o_proj", "grid": "int8-channel"}])
    assert topology_problems(rows, 2) == []
    halves = plan(described, [{"match": "self_attn.*", "grid": "int8"}])
    assert topology_group_sizes(halves, 2) == [CHANNEL]


def test_engines_limits_are_told_once_for_all_grids(tmp_path: Path) -> None:
    rules = [{"match": "self_attn.*", "grid": "int8-g16"}, {"match": "mlp.*", "grid": "int4-g16"}]
    notices = told(plan(model("llama"), rules), tmp_path, "llama")
    assert len(notices) == len(set(notices)) == 2
    assert "no kernel for such groups" in notices[0]
    # Of each grid what concerns its layout: int4 in groups is no block of FP8, and has its own limits.
    floats = {"format": "fp8_dynamic", "grid": {"bits": 8, "group_size": -1}}
    mixed = told(plan(model("llama"), [{"match": "mlp.*", "grid": "int4-g16"}], **floats), tmp_path, "llama")
    assert [one.partition(" (")[0] for one in mixed] == [one.partition(" (")[0] for one in notices]
    assert told(plan(model("llama"), [{"match": "mlp.*", "grid": "int4-g32"}], **floats), tmp_path, "llama") == []


def test_recipes_without_rules_have_the_digest_that_they_had() -> None:
    # Journals of runs that began before there were rules name these.
    assert parse_recipe({}).digest() == DIGEST
    assert parse_recipe({"rules": []}).digest() == DIGEST
    assert parse_recipe({"rules": [{"match": "x", "grid": "int8"}]}).digest() != DIGEST
    orders = [[{"match": "x", "grid": "int8"}, {"match": "y", "grid": "skip"}]]
    orders.append(orders[0][::-1])
    assert len({parse_recipe({"rules": rules}).digest() for rules in orders}) == 2


DIGEST = "db8cbe07d1753ecc452dffee5127eaf89a102cf5702d9736f9b4a56197a4c02d"
