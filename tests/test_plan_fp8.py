"""Plans of FP8 builds: what is refused, what it is called, and which topologies hold blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qconv.cli.quantize import plan_summary
from qconv.errors import RecipeError
from qconv.models import Architecture, architecture
from qconv.plan import BuildPlan, make_plan, topology_problems
from qconv.recipe import parse_recipe
from tests.conftest import FAMILIES, SIZES

KINDS: dict[str, tuple[str, int, str]] = {
    "fp8": ("fp8", 128, "FP8 (E4M3) in blocks of 128 x 128, dynamic activations"),
    "rows": ("fp8_dynamic", -1, "FP8 (E4M3), one scale a row, dynamic activations"),
    "blocks": ("fp8_dynamic", 128, "FP8 (E4M3) in blocks of 128 x 128, dynamic activations"),
    "static": ("fp8_static", -1, "FP8 (E4M3), one scale a weight, static activations"),
}


def model(**changes: Any) -> Architecture:
    return architecture({"model_type": "qwen3_moe", **SIZES, **FAMILIES["qwen3_moe"], **changes})


def plan(described: Architecture, kind: str, **recipe: Any) -> BuildPlan:
    output_format, group_size, _ = KINDS[kind]
    values = {"format": output_format, "method": "rtn", "grid": {"bits": 8, "group_size": group_size}, **recipe}
    return make_plan(described, parse_recipe(values), lambda _: torch.bfloat16)


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
@pytest.mark.parametrize("method", ["awq", "gptq", "awq+gptq"])
def test_methods_that_round_to_integers_are_refused(kind: str, method: str) -> None:
    with pytest.raises(RecipeError, match=r"^method: .* rounds to integers, and format fp8\w* holds floats") as caught:
        plan(model(), kind, method=method)
    assert caught.value.exit_code == 2


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


def test_engines_that_fuse_linears_cannot_hold_ragged_blocks() -> None:
    # 64 outputs of gate, then 64 of up, would share a block where they are one linear.
    ragged = plan(model(**WIDE | {"moe_intermediate_size": 64}), "fp8")
    assert any(
        problem.startswith("gate_proj: 64 output features over 1 ranks") for problem in topology_problems(ragged, 1)
    )


def test_rows_and_whole_weights_split_anywhere() -> None:
    for kind in ("rows", "static"):
        assert topology_problems(plan(model(**WIDE | {"moe_intermediate_size": 40}), kind), 4) == []


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_whole_blocks_are_pointed_out(kind: str) -> None:
    whole = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 128, "num_key_value_heads": 2}
    assert plan(model(**whole), kind).notices() == []
    notices = plan(model(**whole | {"moe_intermediate_size": 192}), kind).notices()
    if KINDS[kind][1] == -1:
        assert notices == []  # no blocks
        return
    (notice,) = notices
    # 2 layers of 6 experts, each with gate, up and down.
    first = "model.layers.0.mlp.experts.0.gate_proj of 192 x 256"
    assert notice.startswith(f"36 linears are not whole blocks of 128 x 128, the first {first}")
