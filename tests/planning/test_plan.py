"""Plans: every tensor once, sizes exact, and what cannot work refused before anything is read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from qconv.core.architecture import Architecture
from qconv.engines.subject import Deployment
from qconv.errors import RecipeError
from qconv.models import architecture
from qconv.planning.engines import judgements, sentences, subject_of_plan
from qconv.planning.plan import BuildPlan, make_plan
from qconv.planning.recipe import parse_recipe
from qconv.planning.topology import topology_group_sizes, topology_problems
from tests.conftest import EXPERTS, FAMILIES, SIZES, small_recipe


def model(model_type: str, **changes: Any) -> Architecture:
    """A small architecture."""
    return architecture({"model_type": model_type, **SIZES, **FAMILIES[model_type], **changes})


def plan(described: Architecture, **recipe: Any) -> BuildPlan:
    """A plan of bf16 weights."""
    output_format = recipe.pop("format", "w4a16")
    return make_plan(described, small_recipe("rtn", output_format, **recipe), lambda _: torch.bfloat16)


def told(planned: BuildPlan, folder: Path, model_type: str) -> list[str]:
    """What is said of engines that read the format."""
    subject = subject_of_plan(planned, {"model_type": model_type, **SIZES, **FAMILIES[model_type]}, folder)
    return sentences(judgements(subject, (), Deployment()), planned.format.name)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("output_format", ["awq", "w4a16"])
def test_every_module_is_planned_once_and_every_shard_holds_whole_specs(model_type: str, output_format: str) -> None:
    described = model(model_type, attention_bias=True)
    planned = plan(described, format=output_format)
    names = [item.module.name for item in planned.items()]
    assert len(set(names)) == len(names)
    expected = {name.rpartition(".")[0] for name, _ in described.tensors()}
    assert set(names) == expected
    quantized = {linear.name for linear in planned.quantized}
    assert quantized == {linear.name for layer in described.layers for linear in layer.linears()}
    assert set(planned.skipped) == {
        *(router.name for layer in described.layers for router in layer.routers()),
        *(["lm_head"] if described.lm_head else []),
    }
    for unit in planned.units:
        assert [spec for _, specs in unit.shards for spec in specs] == [s for item in unit.items for s in item.specs]
    biases = {name for name, _ in described.tensors() if name.endswith(".bias")}
    written = {spec.name for item in planned.items() for spec in item.specs}
    assert biases <= written, "quantizing keeps biases"
    assert not {f"{name}.weight" for name in quantized} & written


def test_sizes_are_those_of_the_files(rtn_build: Path, awq_build: Path) -> None:
    for folder, method, output_format in ((rtn_build, "rtn", "w4a16"), (awq_build, "awq", "awq")):
        config = json.loads((folder / "config.json").read_text())
        planned = make_plan(architecture(config), small_recipe(method, output_format), lambda _: torch.bfloat16)
        files = sorted(folder.glob("*.safetensors"))
        assert [file.name for file in files] == [name for unit in planned.units for name, _ in unit.shards]
        assert planned.output_bytes == sum(file.stat().st_size for file in files)


def test_a_unit_is_cut_where_the_limit_is_and_a_larger_tensor_stands_alone() -> None:
    # Embeddings of 8 MB, layers of about 1.6 MB, a limit of 1 MB: the smallest that a recipe takes.
    described = model("qwen3_moe", hidden_size=256, moe_intermediate_size=256, num_experts=16, vocab_size=16384)
    planned = plan(described, output={"max_shard_size": 10**6})
    shards = [specs for unit in planned.units for _, specs in unit.shards]
    for specs in shards:
        assert len(specs) == 1 or sum(spec.nbytes for spec in specs) <= 10**6
    assert len(planned.units[1].shards) > 1
    for unit in planned.units:
        for (_, one), (_, following) in zip(unit.shards, unit.shards[1:], strict=False):
            assert sum(spec.nbytes for spec in (*one, following[0])) > 10**6, "no shard is cut early"
    names = [name for unit in planned.units for name, _ in unit.shards]
    assert names == [f"model-{n:05d}-of-{len(names):05d}.safetensors" for n in range(1, len(names) + 1)]


@pytest.mark.parametrize("output_format", ["awq", "w4a16"])
@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"hidden_size": 80}, "q_proj"),
        ({"moe_intermediate_size": 48}, "down_proj"),
        ({"head_dim": 20}, "o_proj"),
    ],
)
def test_a_group_size_that_does_not_divide_is_refused_by_key_and_module(
    output_format: str, changes: dict[str, Any], where: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(model("qwen3_moe", **changes), format=output_format)
    message = caught.value.message
    assert message.startswith("grid.group_size: ")
    assert where in message
    assert "group size 32 does not divide" in message


@pytest.mark.parametrize(
    ("output_format", "changes", "sizes"),
    [
        # SmolLM2's 576 and 1536, and its three key-value heads of 64: 128 does not divide 576.
        ("w4a16", {"hidden_size": 576, "head_dim": 144, "intermediate_size": 1536}, "64, 32, -1 (one scale a row)"),
        ("gptq", {"hidden_size": 576, "head_dim": 144, "intermediate_size": 1536}, "64, 32, -1 (one scale a row)"),
        ("awq", {"hidden_size": 576, "head_dim": 144, "intermediate_size": 1536}, "64, 32"),
        ("w4a16", {"hidden_size": 96, "intermediate_size": 96}, "32, -1 (one scale a row)"),
        ("w4a16", {"hidden_size": 80, "intermediate_size": 96}, "-1 (one scale a row)"),
    ],
)
def test_a_group_size_that_does_not_divide_is_refused_with_those_that_do(
    output_format: str, changes: dict[str, Any], sizes: str
) -> None:
    with pytest.raises(RecipeError, match="group size 128 does not divide") as caught:
        plan(model("llama", **changes), format=output_format, grid={"group_size": 128})
    hint = str(caught.value.hint)
    assert hint.startswith(f"Group sizes that fit every linear: {sizes}")
    for size in (int(word.split()[0]) for word in sizes.split(", ")):
        assert plan(model("llama", **changes), format=output_format, grid={"group_size": size})


def test_where_no_group_size_fits_the_hint_says_what_to_leave_alone() -> None:
    described = model("llama", head_dim=21)  # o reads 84 inputs; k and v give 42 rows, which no word of eight holds
    with pytest.raises(RecipeError) as caught:
        plan(described, format="awq")
    patterns = re.findall(r"--skip '([^']*)'", str(caught.value.hint))
    assert patterns == [f"*.self_attn.{name}_proj" for name in "qkvo"]
    assert plan(described, format="awq", skip=patterns).quantized


def test_a_pattern_that_names_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^skip: '\*\.q_prj' matches no module") as caught:
        plan(model("qwen3_moe"), skip=["*.o_proj", "*.q_prj"])
    assert "model.layers.1.self_attn.q_proj" in str(caught.value.hint)
    # What is left alone anyway may be named, a tied head too.
    tied = model("llama", tie_word_embeddings=True)
    assert plan(tied, skip=["lm_head", "model.embed_tokens", "*layernorm"]).quantized
    assert plan(model("qwen3_moe"), skip=["*.mlp.gate"]).quantized


def test_a_recipe_that_skips_everything_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^skip: leaves no linear to quantize"):
        plan(model("qwen3_moe"), skip=["*.self_attn.*", "*.mlp.experts.*"])


LIMITED: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"format": "gptq", "grid": {"group_size": 32, "symmetric": False}}, "qwen3_moe", ["vLLM", "SGLang"]),
    ({"format": "gptq", "grid": {"group_size": 32, "symmetric": False}}, "llama", ["vLLM"]),
    ({"format": "gptq", "grid": {"group_size": 32, "bits": 2}}, "llama", ["vLLM"]),
    ({"format": "gptq", "grid": {"group_size": 32, "bits": 2}}, "qwen3_moe", ["vLLM", "SGLang"]),
    ({"format": "gptq", "grid": {"group_size": 32, "bits": 8}}, "qwen3_moe", []),
    ({"format": "gptq"}, "qwen3_moe", []),
    ({"format": "awq"}, "qwen3_moe", []),
    ({"format": "w4a16"}, "qwen3_moe", []),
    ({"format": "w4a16", "grid": {"group_size": 16}}, "llama", ["vLLM", "SGLang"]),
    ({"format": "w4a16", "grid": {"group_size": -1}}, "llama", []),
    (
        {"format": "w4a16", "grid": {"group_size": 32, "bits": 8, "symmetric": False}},
        "mixtral",
        ["vLLM", "SGLang", "transf"],
    ),
    ({"format": "w4a16", "grid": {"group_size": 32, "bits": 8, "symmetric": False}}, "llama", ["transformers"]),
]


@pytest.mark.parametrize(("recipe", "model_type", "engines"), LIMITED, ids=lambda value: str(value))
def test_what_engines_refuse_is_told(
    recipe: dict[str, Any], model_type: str, engines: list[str], tmp_path: Path
) -> None:
    said = told(plan(model(model_type), **recipe), tmp_path, model_type)
    assert [notice.startswith(engine) for engine, notice in zip(engines, said, strict=True)] == [True] * len(engines)
    assert all(re.search(r"\d.* \((run|read|thread); .*\): ", notice) for notice in said), "which version, how known"


def test_desc_act_is_told(tmp_path: Path) -> None:
    values = {"format": "gptq", "method": "gptq", "grid": {"group_size": 32}, "gptq": {"ordering": "desc_act"}}
    planned = make_plan(model("llama"), parse_recipe(values), lambda _: torch.bfloat16)
    (notice,) = told(planned, tmp_path, "llama")
    assert "refuses desc_act" in notice


def test_experts_that_are_left_alone_limit_nothing(tmp_path: Path) -> None:
    recipe = {"format": "w4a16", "grid": {"group_size": 32, "bits": 8, "symmetric": False}}
    (notice,) = told(plan(model("qwen3_moe"), skip=["*.experts.*"], **recipe), tmp_path, "qwen3_moe")
    assert notice.startswith("transformers")


FUSED: list[tuple[str, list[str], str | None]] = [
    ("qwen3_moe", ["*.q_proj"], "q, k and v"),
    ("qwen3_moe", ["*.layers.1.self_attn.[qk]_proj"], "q, k and v of layer 1"),
    ("qwen3_moe", ["*.[qkv]_proj"], None),
    ("qwen3_moe", ["*.o_proj"], None),
    ("qwen3_moe", ["*.experts.3.*"], "the experts"),
    ("qwen3_moe", ["*.experts.*.down_proj"], "the experts"),
    ("qwen3_moe", ["model.layers.0.mlp.experts.*"], None),
    ("qwen2_moe", ["*.shared_expert.gate_proj"], "the shared expert's gate and up"),
    ("qwen2_moe", ["*.shared_expert.*"], None),
    ("qwen2_moe", ["*.shared_expert.down_proj"], None),
    ("llama", ["*.up_proj"], "gate and up"),
    ("llama", ["*.up_proj", "*.gate_proj"], None),
]


@pytest.mark.parametrize(("model_type", "skip", "fault"), FUSED, ids=lambda value: str(value))
def test_what_engines_fuse_is_skipped_together_or_not_at_all(
    model_type: str, skip: list[str], fault: str | None
) -> None:
    described = model(model_type)
    if fault is None:
        planned = plan(described, skip=skip)
        names = [linear.name for layer in described.layers for linear in layer.linears()]
        skipped = [name for name in names if planned.recipe.skips(name)]
        assert skipped
        assert not {linear.name for linear in planned.quantized} & set(skipped)
        assert set(skipped) <= set(planned.skipped)
        return
    with pytest.raises(RecipeError, match=r"^skip: ") as caught:
        plan(described, skip=skip)
    assert fault in caught.value.message


def test_a_skipped_module_needs_no_fitting_group() -> None:
    described = model("qwen3_moe", head_dim=20)  # o sees 80 inputs
    assert plan(described, skip=["*.o_proj"])


def test_modules_come_in_the_order_of_the_work() -> None:
    (layer, *_) = model("qwen2_moe").layers
    names = [module.name.removeprefix("model.layers.0.") for module in layer.modules()]
    assert names[:6] == [
        "input_layernorm",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "post_attention_layernorm",
    ]
    assert names[6:8] == ["mlp.gate", "mlp.shared_expert_gate"]
    assert names[-3:] == [f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")]


def test_scale_dtype_follows_the_weights_and_tensors_keep_theirs() -> None:
    described = model("qwen3")

    def dtype_of(name: str) -> torch.dtype:
        return torch.float32 if "norm" in name else torch.float16

    planned = make_plan(described, small_recipe(), dtype_of)
    specs = {spec.name: spec for item in planned.items() for spec in item.specs}
    assert specs["model.layers.0.self_attn.q_proj.weight_scale"].dtype == torch.float16
    assert specs["model.layers.0.input_layernorm.weight"].dtype == torch.float32
    assert specs["model.embed_tokens.weight"].dtype == torch.float16


def test_topologies() -> None:
    planned = plan(model("qwen3_moe", moe_intermediate_size=64))
    assert topology_problems(planned, 1) == []
    assert topology_problems(planned, 2) == [
        "o_proj: 96 input features over 2 ranks are 48 each, not a multiple of 32"
        " (first in model.layers.0.self_attn.o_proj)"
    ]
    three = " ".join(topology_problems(planned, 3))
    assert "4 attention heads do not split over 3 ranks" in three
    assert "2 key-value heads neither split over nor repeat on 3 ranks" in three
    # A rank of awq must own whole words of eight columns: 8 ranks of gate have 4 each.
    words = plan(model("qwen3_moe", **EXPERTS | {"moe_intermediate_size": 32}), format="awq")
    assert any(
        problem.startswith("gate_proj: 32 output features over 8 ranks are 4 each")
        for problem in topology_problems(words, 8)
    )


def test_group_sizes_that_split_are_found() -> None:
    # o reads 96 inputs, 48 a rank; down 64, 32 a rank.
    planned = plan(model("qwen3_moe", moe_intermediate_size=64))
    assert topology_group_sizes(planned, 2) == [-1]
    wide = plan(model("qwen3_moe", hidden_size=256, head_dim=64, moe_intermediate_size=256), grid={"group_size": 128})
    assert topology_problems(wide, 4)
    assert topology_group_sizes(wide, 4) == [64, 32, -1]
    # Heads do not split whatever the groups are.
    assert topology_group_sizes(planned, 3) == []


def test_the_plan_needs_a_known_format() -> None:
    with pytest.raises(RecipeError, match="format: unknown format 'gguf'"):
        make_plan(model("llama"), parse_recipe({"format": "gguf"}), lambda _: torch.bfloat16)


@pytest.mark.parametrize(("match", "is_told"), [("layers.0.mlp.experts.*", True), ("mlp.experts.*", False)])
def test_a_reader_that_takes_one_grid_for_all_experts_is_told_of(match: str, is_told: bool, tmp_path: Path) -> None:
    rules = [{"match": match, "grid": "int8-g32"}, {"match": "self_attn.*", "grid": "int8-channel"}]
    planned = plan(model("qwen3_moe"), format="w4a16", grid={"group_size": 32}, rules=rules)
    said = told(planned, tmp_path, "qwen3_moe")
    assert any("takes one grid for the experts of all layers" in notice for notice in said) == is_told
