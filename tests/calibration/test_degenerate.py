"""Experts with nothing to go by: no token, zeros for weights, inputs without variety. Sound, and reported."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from qconv.artifacts.build import Build
from qconv.folders.state import REPORT_NAME
from qconv.verification.build import verify
from tests.conftest import build, random_model, save_model, small_recipe

LONELY, ZEROS = 1, 4  # experts of layer 0


@pytest.fixture(scope="module")
def degenerate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse model whose layer 0 never chooses one expert and holds zeros in another; inputs of layer 1 are dead."""
    model = random_model("qwen3_moe")
    first, second = model.model.layers
    with torch.no_grad():
        norm = first.post_attention_layernorm.weight
        norm[:8] = 0.0
        # One input is large for every token, and only the lonely expert's router row looks at it, with a minus.
        model.model.embed_tokens.weight[:, 20] = 10.0
        first.mlp.gate.weight[:, 20] = 2.0
        first.mlp.gate.weight[LONELY] = 0.0
        first.mlp.gate.weight[LONELY, 20] = -30.0
        first.mlp.experts.gate_up_proj[ZEROS] = 0.0
        first.mlp.experts.down_proj[ZEROS] = 0.0
        second.input_layernorm.weight[:] = 0.0
    return save_model(model, tmp_path_factory.mktemp("degenerate") / "model")


@pytest.mark.parametrize("shrinkage", [0, 16])
@pytest.mark.parametrize(("method", "output_format"), [("gptq", "gptq"), ("awq+gptq", "w4a16"), ("awq", "w4a16")])
def test_a_sound_result_and_a_word_in_the_report(
    degenerate: Path, tmp_path: Path, method: str, output_format: str, shrinkage: int
) -> None:
    out = tmp_path / "out"
    recipe = small_recipe(method, output_format, calibration={"shrinkage_tokens": shrinkage})
    build(degenerate, out, recipe)
    assert not verify(out, against=degenerate).problems
    made = Build.open(out)
    for layer in made.architecture.layers:
        for linear in layer.linears():
            weight = made.qtensor(linear)
            assert bool(torch.isfinite(weight.dequantize()).all()), linear.name
            if f"0.mlp.experts.{ZEROS}." in linear.name:
                assert not weight.dequantize().any(), linear.name
    report = json.loads((out / REPORT_NAME).read_text())
    said = {row["module"]: row["what"] for row in report["degenerate"]}
    lonely = f"model.layers.0.mlp.experts.{LONELY}"
    share = "100 %" if shrinkage else "0 %"
    assert said[lonely] == f"saw no calibration token: {share} of its statistics are the layer's"
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        assert said[f"model.layers.0.mlp.experts.{ZEROS}.{leaf}"].startswith("is exact")
    card = (out / "README.md").read_text()
    assert f"Degenerate modules: {len(said)}" in card
    assert lonely in card
    if "gptq" in method:
        _check_compensations(report)


def _check_compensations(report: dict[str, Any]) -> None:
    first, second = (layer["compensations"] for layer in report["layers"])
    # Eight of the norm's weights are zero, and all of the second layer's.
    assert first["model.layers.0.mlp.experts.0.gate_proj"]["dead_columns"] == 8
    assert second["model.layers.1.self_attn.q_proj"]["dead_columns"] == 64
    for record in (*first.values(), *second.values()):
        assert record["error"] <= record["rtn_error"]
        assert math.isfinite(record["rtn_error"])
