"""Weights whose scales float16 does not hold end AWQ and GPTQ with their names, the format and a way out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qconv.errors import CheckpointError, RecipeError
from qconv.planning.recipe import Recipe
from tests.artifacts.test_source import edit_tensors
from tests.conftest import build, small_recipe

EXPERT = "model.layers.1.mlp.experts.2"
FORMATS = ["awq", "gptq"]
METHODS = {"awq": ["rtn", "awq", "gptq"], "gptq": ["rtn", "gptq"]}
CASES = [(output_format, method) for output_format in FORMATS for method in METHODS[output_format]]


def scaled(folder: Path, change: Callable[[Tensor], Tensor], names: str = EXPERT) -> Path:
    """Change some weights of a checkpoint."""

    def apply(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.startswith(names) and name.endswith("_proj.weight"):
                tensors[name] = change(tensors[name])

    return edit_tensors(folder, apply)


def one_large(weight: Tensor) -> Tensor:
    """One weight so large that a step of a fifteenth of it, or a seventh, is beyond float16."""
    weight = weight.clone()
    weight[3, 5] = 2e6
    return weight


def refused(model: Path, out: Path, recipe: Recipe, tensor: str, **options: Any) -> str:
    """The hint of a refusal that names a tensor and float16."""
    with pytest.raises(RecipeError, match=rf"{re.escape(tensor)}.*float16") as caught:
        build(model, out, recipe, **options)
    assert caught.value.exit_code == 2
    return str(caught.value.hint)


@pytest.mark.parametrize(("output_format", "method"), CASES)
@pytest.mark.parametrize("change", [one_large, lambda weight: weight * 1e-7], ids=["large", "tiny"])
def test_a_weight_beyond_float16_is_named_with_a_way_out(
    moe_copy: Path, tmp_path: Path, output_format: str, method: str, change: Callable[[Tensor], Tensor]
) -> None:
    scaled(moe_copy, change)
    hint = refused(moe_copy, tmp_path / "out", small_recipe(method, output_format), f"{EXPERT}.")
    assert "--fmt w4a16, whose scales are bfloat16" in hint
    patterns = re.findall(r"--skip '([^']*)'", hint)
    assert patterns
    build(moe_copy, tmp_path / "skipped", small_recipe(method, output_format, skip=patterns))
    build(moe_copy, tmp_path / "w4a16", small_recipe("rtn", "w4a16"))


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_it_is_told_before_any_layer_is_calibrated(moe_copy: Path, tmp_path: Path, method: str) -> None:
    scaled(moe_copy, one_large)
    seen: list[str] = []
    recipe = small_recipe(method, "gptq")
    refused(moe_copy, tmp_path / "out", recipe, f"{EXPERT}.", progress=lambda key, *_: seen.append(key))
    assert set(seen) == {"scales"}
    assert not list((tmp_path / "out").glob("*.safetensors*"))


def test_a_finished_build_stays_where_a_new_run_cannot_start(moe: Path, moe_copy: Path, tmp_path: Path) -> None:
    made = build(moe, tmp_path / "out", small_recipe("rtn", "gptq")).out
    scaled(moe_copy, one_large)
    before = {file.name: file.read_bytes() for file in made.glob("*.safetensors")}
    refused(moe_copy, made, small_recipe("gptq", "gptq"), f"{EXPERT}.", restart=True)
    assert {file.name: file.read_bytes() for file in made.glob("*.safetensors")} == before


def test_a_damaged_weight_is_told_before_any_layer_is_calibrated(moe_copy: Path, tmp_path: Path) -> None:
    scaled(moe_copy, lambda weight: weight * torch.nan)
    seen: list[str] = []
    with pytest.raises(CheckpointError, match=rf"{re.escape(EXPERT)}.*not finite"):
        build(moe_copy, tmp_path / "out", small_recipe("gptq", "gptq"), progress=lambda key, *_: seen.append(key))
    assert set(seen) == {"scales"}


def test_a_few_tiny_rows_are_no_reason_to_refuse(moe_copy: Path, tmp_path: Path) -> None:
    def tiny_rows(weight: Tensor) -> Tensor:
        weight = weight.clone()
        weight[::4] *= 1e-7  # dead channels: their energy is nothing beside the others'
        return weight

    scaled(moe_copy, tiny_rows)
    assert build(moe_copy, tmp_path / "out", small_recipe("gptq", "gptq")).out


def test_bf16_scales_hold_what_float16_does_not(moe_copy: Path, tmp_path: Path) -> None:
    scaled(moe_copy, lambda weight: weight * 1e-7)
    assert build(moe_copy, tmp_path / "out", small_recipe("gptq", "w4a16")).out
