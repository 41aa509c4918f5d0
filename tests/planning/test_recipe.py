"""Recipes: what is refused is named by file and key, and what is packaged works on the model that it is for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from evals.recipes import general_recipes
from qconv.building.bench import SliceShape
from qconv.core.architecture import Architecture
from qconv.errors import RecipeError
from qconv.models import architecture
from qconv.planning.costs import demand_of
from qconv.planning.plan import make_plan
from qconv.planning.recipe import Recipe, load_recipe, parse_recipe, read_values, replaced
from qconv.planning.topology import topology_problems

BAD: list[tuple[dict[str, Any], str]] = [
    ({"grids": {}}, "grids: unknown key"),
    ({"grid": {"group": 128}}, "grid.group: unknown key"),
    ({"calibration": {"token": 1}}, "calibration.token: unknown key"),
    ({"grid": 4}, "grid: "),
    ({"grid": {"bits": "4"}}, "grid.bits: "),
    ({"grid": {"bits": 4.5}}, "grid.bits: "),
    ({"grid": {"bits": True}}, "grid.bits: "),
    ({"grid": {"bits": 1}}, "grid.bits: "),
    ({"grid": {"bits": 9}}, "grid.bits: "),
    ({"grid": {"group_size": 0}}, "grid.group_size: must be -1"),
    ({"grid": {"group_size": -2}}, "grid.group_size: must be -1"),
    ({"grid": {"symmetric": "yes"}}, "grid.symmetric: "),
    ({"method": "gptq2"}, "method: gptq2 is no method; known are rtn, awq, gptq, awq+gptq"),
    ({"method": ["gptq", "awq"]}, "method: gptq+awq is no method"),
    ({"method": 3}, "method: "),
    ({"awq": {"alpha_points": 10}}, "awq.alpha_points: "),  # the least that a search is worth
    ({"clip": {"steps": 0}}, "clip.steps: "),
    ({"clip": {"max_shrink": 1.0}}, "clip.max_shrink: "),
    ({"calibration": {"tokens": 1000, "sequence_length": 512}}, "tokens 1000 is not a multiple of sequence_length 512"),
    ({"calibration": {"tokens": 0}}, "calibration.tokens: "),
    ({"calibration": {"routing": "some"}}, "calibration.routing: "),
    ({"calibration": {"seed": -1}}, "calibration.seed: "),
    ({"skip": "lm_head"}, "skip: "),
    ({"skip": [""]}, "skip.0: "),
    ({"output": {"max_shard_size": 10}}, "output.max_shard_size: "),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_key_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(values, where="mine.yaml")
    assert caught.value.message.startswith("mine.yaml: ")
    assert message in caught.value.message
    assert caught.value.exit_code == 2


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"grid": {"bits": 1, "oops": 2}, "what": 3})
    for part in ("grid.bits: ", "grid.oops: unknown key", "what: unknown key"):
        assert part in caught.value.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "cannot be read as YAML"),
        ("- 1", "a recipe is a mapping"),
        ("text", "a recipe is a mapping"),
        ("1: 2", "1: "),
        ("a: !!python/object/apply:os.system [true]", "cannot be read as YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"mine\.yaml") as caught:
        load_recipe(str(path))
    assert message in caught.value.message


def test_unreadable_files_are_named_with_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for source in (tmp_path / "absent.yaml", tmp_path, tmp_path / "binary.yaml"):
        with pytest.raises(RecipeError, match=source.name) as caught:
            load_recipe(str(source))
        assert "awq" in (caught.value.hint or "")


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_recipe(str(tmp_path / "empty.yaml")) == Recipe()


def test_methods_combine_as_a_list_or_with_a_plus() -> None:
    for method in (["awq", "gptq"], "awq+gptq"):
        recipe = parse_recipe({"method": method})
        assert (recipe.method, recipe.method_name) == (("awq", "gptq"), "awq+gptq")
        assert recipe.model_dump(mode="json")["method"] == ["awq", "gptq"]
        assert parse_recipe(recipe.model_dump(mode="json")) == recipe
    assert parse_recipe({"method": "rtn"}).model_dump(mode="json")["method"] == "rtn"


def test_overrides_replace_single_keys() -> None:
    changed = load_recipe("awq", {"calibration.tokens": 1024, "method": "rtn"})
    assert (changed.calibration.tokens, changed.method) == (1024, ("rtn",))
    assert changed.calibration.sequence_length == load_recipe("awq").calibration.sequence_length
    with pytest.raises(RecipeError, match=r"calibration\.oops: unknown key"):
        load_recipe("awq", {"calibration.oops": 1})
    with pytest.raises(RecipeError, match="format: not a section"):
        load_recipe("awq", {"format.bits": 1})


def test_an_override_begins_a_section_that_is_null_and_changes_nothing_else() -> None:
    values = {"calibration": None, "grid": {"bits": 8}}
    assert replaced(values, {"calibration.tokens": 1024, "grid.group_size": 64}) == {
        "calibration": {"tokens": 1024},
        "grid": {"bits": 8, "group_size": 64},
    }
    assert values == {"calibration": None, "grid": {"bits": 8}}


def test_the_digest_tells_recipes_apart_and_defaults_from_nothing() -> None:
    assert parse_recipe({}).digest() == parse_recipe({"grid": {"bits": 4}}).digest()
    digests = {
        parse_recipe(values).digest()
        for values in ({}, {"grid": {"bits": 8}}, {"skip": ["a"]}, {"calibration": {"seed": 1}}, {"method": "rtn"})
    }
    assert len(digests) == 5


def test_skip_patterns_match_whole_names() -> None:
    recipe = parse_recipe({"skip": ["model.layers.1.*", "*.q_proj"]})
    assert recipe.skips("model.layers.1.mlp.down_proj")
    assert recipe.skips("model.layers.7.self_attn.q_proj")
    assert not recipe.skips("model.layers.11.mlp.down_proj")
    assert not recipe.skips("model.layers.7.self_attn.k_proj")


def test_clipping_is_searched_where_the_method_looks_at_activations() -> None:
    assert parse_recipe({"method": "awq"}).searches_clipping
    assert not parse_recipe({"method": "rtn"}).searches_clipping
    assert parse_recipe({"method": "rtn", "clip": {"enabled": True}}).searches_clipping
    assert not parse_recipe({"method": "awq", "clip": {"enabled": False}}).searches_clipping


@pytest.fixture(scope="session")
def coder() -> Architecture:
    """Qwen3-Coder-480B-A35B."""
    return architecture(SliceShape().config(62, 160))


def safetensors_recipes() -> list[str]:
    """The packaged recipes for every family that are not of GGUF."""
    return [name for name in general_recipes() if read_values(name)[0]["format"] != "gguf"]


@pytest.mark.parametrize("name", safetensors_recipes())
def test_every_packaged_recipe_plans_the_whole_480b(name: str, coder: Architecture) -> None:
    recipe = load_recipe(name)
    plan = make_plan(coder, recipe, lambda _: torch.bfloat16)
    assert plan.weights == 480_154_875_392  # of the published checkpoint
    assert len(plan.quantized) == 62 * (4 + 160 * 3)
    # Every layer's router and the head, nothing else.
    assert plan.skipped == [*(f"model.layers.{index}.mlp.gate" for index in range(62)), "lm_head"]
    group = recipe.grid.group_size
    # A 16-bit scale a group, and a zero point's 4 bits or an index of groups where the format has them. Blocks, rows of
    # at least 2560 and whole weights have next to nothing; groups of 16 or 32 floats have a scale of 8 bits.
    bits, shared = recipe.grid.bits, 0 if group == -1 else 1 / group
    if any(grid.is_float for grid in plan.grids()):
        shared = 0.5 / group if group in (16, 32) else 0
    if any(grid.based for grid in plan.grids()):
        shared *= 2  # a bias beside each scale
    if not recipe.rules:
        assert bits + 16 * shared <= plan.quantized_bits_per_weight <= bits + 20 * shared + 0.02
    sizes = [sum(spec.nbytes for spec in specs) for unit in plan.units for _, specs in unit.shards]
    assert max(sizes) <= recipe.output.max_shard_size
    names = [shard for unit in plan.units for shard, _ in unit.shards]
    assert len(set(names)) == len(names)
    assert names == sorted(names)
    tensors = [spec.name for unit in plan.units for _, specs in unit.shards for spec in specs]
    assert len(set(tensors)) == len(tensors)
    assert demand_of(plan).at(2) < 8 * 2**30  # the bound for awq
    # 2560 columns are 320 on each of 8 ranks: groups of 64 fit there, groups of 128 do not; 4 ranks take both.
    assert (topology_problems(plan, 8) == []) == (group != 128)
    assert topology_problems(plan, 4) == []


@pytest.mark.parametrize(
    "values",
    [
        {"calibration": {"seed": 10**30}},
        {"grid": {"group_size": 2**63}},
        {"gptq": {"damp_percent": math.nan}},
        {"clip": {"max_shrink": math.nan}},
        {"output": {"max_shard_size": math.inf}},
    ],
)
def test_numbers_that_no_machine_holds_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        parse_recipe(values)
