"""Plans of FP8 builds: what is refused, what it is called, and which topologies hold blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qconv.cli.quantize import plan_summary
from qconv.core.architecture import Architecture
from qconv.engines.subject import Deployment
from qconv.engines.transformers import ENGINE
from qconv.errors import RecipeError
from qconv.models import architecture
from qconv.planning.engines import subject_of_plan
from qconv.planning.plan import BuildPlan, make_plan
from qconv.planning.recipe import parse_recipe
from qconv.planning.topology import topology_problems
from tests.conftest import FAMILIES, SIZES

KINDS: dict[str, tuple[str, int, str]] = {
    "fp8": ("fp8", 128, "FP8 (E4M3) in blocks of 128 x 128, dynamic activations"),
    "rows": ("fp8_dynamic", -1, "FP8 (E4M3), one scale a row, dynamic activations"),
    "blocks": ("fp8_dynamic", 128, "FP8 (E4M3) in blocks of 128 x 128, dynamic activations"),
    "static": ("fp8_static", -1, "FP8 (E4M3), one scale a weight, static activations"),
}


WHOLE: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 128, "num_key_value_heads": 2}
"""Sizes that are whole blocks of 128 everywhere."""


def model(model_type: str = "qwen3_moe", **changes: Any) -> Architecture:
    return architecture({"model_type": model_type, **SIZES, **FAMILIES[model_type], **WHOLE, **changes})


def plan(described: Architecture, kind: str, **recipe: Any) -> BuildPlan:
    output_format, group_size, _ = KINDS[kind]
    values = {"format": output_format, "method": "rtn", "grid": {"bits": 8, "group_size": group_size}, **recipe}
    return make_plan(described, parse_recipe(values), lambda _: torch.bfloat16)


def found(planned: BuildPlan, key: str) -> list[str]:
    """What a rule of transformers finds in a plan."""
    (rule,) = (rule for rule in ENGINE.rules if rule.key == key)
    return list(
        rule.breaches(subject_of_plan(planned, {"model_type": "qwen3_moe"}, Path(__file__).parent), Deployment())
    )


@pytest.mark.parametrize("kind", KINDS)
def test_weights_keep_their_names_and_scales_stand_beside_them(kind: str) -> None:
    planned = plan(model(attention_bias=True), kind)
    specs = {spec.name: spec for item in planned.items() for spec in item.specs}
    for linear in planned.quantized:
        assert specs[linear.weight].dtype == torch.float8_e4m3fn
        assert specs[linear.weight].shape == (linear.out_features, linear.in_features)
    assert specs["model.layers.0.self_attn.q_proj.bias"].dtype == torch.bfloat16
    assert specs["model.layers.0.mlp.gate.weight"].dtype == torch.bfloat16
    assert planned.scheme == KINDS[kind][2]
    assert f"rtn to {planned.format.name}, {planned.scheme}: " in plan_summary(planned)


def test_only_stored_scales_of_inputs_need_calibration() -> None:
    assert [kind for kind in KINDS if plan(model(), kind).needs_calibration] == ["static"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
def test_scales_for_integers_are_refused(kind: str, method: str) -> None:
    with pytest.raises(
        RecipeError, match=r"^method: .* searches scales for integers, and format fp8\w* holds"
    ) as caught:
        plan(model(), kind, method=method)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("kind", KINDS)
def test_compensation_needs_a_scale_that_no_other_linear_shares(kind: str) -> None:
    if KINDS[kind][2].endswith("static activations"):
        with pytest.raises(RecipeError, match="fp8_static is rounded to nearest"):
            plan(model(), kind, method="gptq")
    else:
        assert plan(model(), kind, method="gptq").needs_calibration
        with pytest.raises(RecipeError, match=r"gptq\.ordering: desc_act"):
            plan(model(), kind, method="gptq", gptq={"ordering": "desc_act"})


@pytest.mark.parametrize("kind", KINDS)
def test_other_bits_are_refused(kind: str) -> None:
    with pytest.raises(RecipeError, match=r"^grid\.bits: the fp8\w* format holds 8 bits, not 4"):
        plan(model(), kind, grid={"bits": 4, "group_size": KINDS[kind][1]})


WIDE: dict[str, Any] = {"hidden_size": 512, "head_dim": 128, "moe_intermediate_size": 512, "num_key_value_heads": 2}


def test_a_rank_must_own_whole_blocks_along_either_side() -> None:
    # Two ranks own 256 of everything; four own one block of q, gate, up, and the one of a key-value head.
    assert [topology_problems(plan(model(**WIDE), "fp8"), ranks) for ranks in (1, 2, 4)] == [[], [], []]
    narrow = plan(model(**WIDE | {"moe_intermediate_size": 384}), "fp8")
    assert topology_problems(narrow, 2) == [
        "gate_proj: 384 output features over 2 ranks are 192 each, not a multiple of 128"
        " (first in model.layers.0.mlp.experts.0.gate_proj)",
        "up_proj: 384 output features over 2 ranks are 192 each, not a multiple of 128"
        " (first in model.layers.0.mlp.experts.0.up_proj)",
        "down_proj: 384 input features over 2 ranks are 192 each, not a multiple of 128"
        " (first in model.layers.0.mlp.experts.0.down_proj)",
    ]
    heads = plan(model(**WIDE | {"head_dim": 64, "num_attention_heads": 8}), "fp8")
    found = topology_problems(heads, 4)
    # Two key-value heads of 64 are a block that two owners would share.
    assert [problem.partition(":")[0] for problem in found] == ["k_proj", "v_proj"]
    assert "128 output features over 2 ranks are 64 each" in found[0]


def test_rows_and_whole_weights_split_anywhere() -> None:
    for kind in ("rows", "static"):
        assert topology_problems(plan(model(**WIDE | {"moe_intermediate_size": 40}), kind), 4) == []


RAGGED: list[tuple[str, dict[str, Any], list[str], list[str], str]] = [
    # What is ragged, other patterns of skip, the patterns that the hint gives, and what is said of the first misfit.
    ("qwen3_moe", {"moe_intermediate_size": 192}, [], ["*.mlp.experts.*"], "experts.0.gate_proj .* 192 rows"),
    ("qwen2_moe", {"moe_intermediate_size": 192}, [], ["*.mlp.experts.*"], "experts.0.gate_proj .* 192 rows"),
    ("mixtral", {"intermediate_size": 192}, [], ["*.block_sparse_moe.experts.*"], "experts.0.w1 .* 192 rows"),
    (
        "qwen2_moe",
        {"shared_expert_intermediate_size": 64},
        [],
        [f"*.mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")],
        "shared_expert.gate_proj .* 64 rows",
    ),
    # Only k and v are ragged, and q is held with them.
    ("llama", {"num_key_value_heads": 1}, [], [f"*.self_attn.{name}_proj" for name in "qkv"], "k_proj .* 64 rows"),
    (
        "llama",
        {"intermediate_size": 320},
        [],
        [f"*.mlp.{name}_proj" for name in ("gate", "up", "down")],
        "gate_proj .* 320 rows",
    ),
    ("llama", {"head_dim": 80}, ["*.[qkv]_proj"], ["*.self_attn.o_proj"], "o_proj .* 320 inputs"),
    # One layer alone: dense, beside sparse ones of whole blocks.
    (
        "qwen3_moe",
        {"intermediate_size": 96, "mlp_only_layers": [1]},
        [],
        [f"*.mlp.{name}_proj" for name in ("gate", "up", "down")],
        "layers.1.mlp.gate_proj .* 96 rows",
    ),
]


@pytest.mark.parametrize("kind", ["fp8", "blocks"])
@pytest.mark.parametrize(("model_type", "changes", "skip", "patterns", "said"), RAGGED, ids=lambda value: str(value))
def test_what_engines_cannot_read_in_blocks_is_refused_with_the_patterns_that_help(
    kind: str, model_type: str, changes: dict[str, Any], skip: list[str], patterns: list[str], said: str
) -> None:
    described = model(model_type, **{"intermediate_size": 256, "shared_expert_intermediate_size": 128} | changes)
    with pytest.raises(RecipeError, match=rf"^format: .*{said} are no multiple") as caught:
        plan(described, kind, skip=skip)
    assert caught.value.exit_code == 2
    hint = str(caught.value.hint)
    assert hint.endswith(" ".join(f"--skip '{pattern}'" for pattern in patterns))
    left = plan(described, kind, skip=[*skip, *patterns])
    assert left.quantized
    assert found(left, "transformers/ragged") == []


def test_a_model_without_any_whole_block_is_told_of_another_format() -> None:
    # As SmolLM2: 576 is four and a half blocks, so that no linear's inputs are whole.
    with pytest.raises(RecipeError, match="q_proj does not fit blocks of 128 x 128: its 576 rows") as caught:
        plan(
            model("llama", hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536), "fp8"
        )
    assert "fp8-dynamic" in str(caught.value.hint)
    assert plan(model("llama", hidden_size=576, num_attention_heads=9, num_key_value_heads=3), "rows").quantized


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_linear_that_stands_alone_are_pointed_out(kind: str) -> None:
    # o and down give 192 rows each, and read whole blocks; all that reads 192 inputs is left alone.
    described = model("llama", hidden_size=192, intermediate_size=256, head_dim=64)
    planned = plan(described, kind, skip=["*.[qkv]_proj", "*.gate_proj", "*.up_proj"])
    said = found(planned, "transformers/ragged")
    assert len(said) == (4 if KINDS[kind][1] == 128 else 0)
    assert all(place.endswith(": 192 x 256") for place in said)


def test_static_experts_in_transformers_are_told_of() -> None:
    assert found(plan(model(), "static"), "transformers/static-experts")
    assert found(plan(model("llama"), "static"), "transformers/static-experts") == []
