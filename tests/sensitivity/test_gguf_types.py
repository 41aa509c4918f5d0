"""Tensors that calibration does not look at have no part in what is chosen to a size, and keep eight bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from qconv.artifacts.source import Source
from qconv.planning.gguf_recipe import parse_gguf_recipe
from qconv.sensitivity.gguf_types import GgufTypes
from tests.gguf_families import saved, wide

UNSEEN = {
    "deepseek_v3": {"attn_k_b", "attn_v_b"},
    "qwen3_next": {"ssm_ba"},
    "qwen3_5_text": {"ssm_alpha", "ssm_beta"},
    "glm4_moe": set(),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_unseen_tensors_are_not_chosen(name: str, tmp_path: Path) -> None:
    source = Source.open(saved(name, tmp_path / "model", **wide(name))[1])
    types = GgufTypes(source, parse_gguf_recipe({"type": "Q4_K_M"}))
    assert not {unit.role for unit in types.units} & UNSEEN[name]
    chosen = {unit.name: types.names(unit)[0] for unit in types.units}
    given = types.recipe_for(chosen).tensor_types
    fixed = {pattern.split(r"\.")[2] for pattern, type in given.items() if type == "Q8_0"}
    assert fixed == UNSEEN[name]
    kept = types.recipe_for(chosen | {next(iter(chosen)): "Q8_0"}).tensor_types
    assert len(kept) == len(given)
