"""FP8 blocks of latent attention, and what is proposed for a model within a larger one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evals.model_types import config_of
from qconv.errors import RecipeError
from qconv.planning.estimate import estimate
from qconv.planning.recipe import parse_recipe
from tests.conftest import small_recipe


def folder(path: Path, values: dict[str, object]) -> Path:
    """Of a config.json alone."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(values | {"dtype": "bfloat16"}))
    return path


FP8 = parse_recipe({"format": "fp8", "method": "rtn", "grid": {"bits": 8, "group_size": 128}})
WIDE = {
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "intermediate_size": 128,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "num_attention_heads": 4,
    "qk_nope_head_dim": 120,
    "v_head_dim": 64,
}


def test_the_last_rows_of_a_fused_matrix_may_end_within_a_block(tmp_path: Path) -> None:
    values = config_of("deepseek_v3").to_dict() | WIDE
    model = folder(tmp_path / "model", values)
    found = estimate(model, FP8)
    assert found is not None
    # q_a comes before it in the same matrix.
    other = folder(tmp_path / "other", values | {"q_lora_rank": 136})
    with pytest.raises(RecipeError, match=r"q_a_proj does not fit blocks of 128 x 128: its 136 rows"):
        estimate(other, FP8)


def test_patterns_name_linears_below_the_layer_of_a_model_within_a_larger_one(tmp_path: Path) -> None:
    text = config_of("qwen3_5_moe_text").to_dict() | {"hidden_size": 80}
    values = {"model_type": "qwen3_5_moe", "text_config": text, "vision_config": {"depth": 1}}
    with pytest.raises(RecipeError) as caught:
        estimate(folder(tmp_path / "model", values), small_recipe("rtn", "w4a16", grid={"group_size": 32}))
    assert "'*.linear_attn.in_proj_qkv'" in str(caught.value.hint)
    assert "language_model" not in str(caught.value.hint)
