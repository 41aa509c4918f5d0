"""Builds in gpt-oss's layout: made, killed and resumed, verified, planned, run; transformers computes the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qconv.artifacts.inspection import inspect
from qconv.artifacts.source import Source
from qconv.errors import RecipeError
from qconv.planning.estimate import estimate
from qconv.planning.recipe import load_recipe
from qconv.runtime.loading import load
from qconv.verification.build import verify
from tests.building.test_pipeline import Stop
from tests.conftest import build, folder_bytes, small_recipe
from tests.gpt_oss import EXPERTS, dense, published, stored

RECIPES = {
    "rtn": small_recipe("rtn", "gpt_oss", skip=["*.self_attn.*"]),
    "gptq": small_recipe(
        "gptq",
        "gpt_oss",
        skip=["*.self_attn.*"],
        refine={"sweeps": 1, "refits": 1},
        calibration={"propagate": "matched"},
    ),
}
IDS = torch.arange(3, 40)[None]
UNTYPED: Any = AutoModelForCausalLM


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense(tmp_path_factory.mktemp("gpt-oss") / "model")


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("builds")
    return {name: build(model, folder / name, recipe).out for name, recipe in RECIPES.items()}


@pytest.mark.parametrize("method", RECIPES)
def test_a_build_verifies_and_is_as_large_as_planned(method: str, made: dict[str, Path], model: Path) -> None:
    for source in (None, model):
        result = verify(made[method], source)
        assert (result.problems, result.notices, result.not_checked) == ([], [], [])
    planned, found = estimate(model, RECIPES[method]), inspect(made[method])
    assert planned.output_bytes == sum(file.stat().st_size for file in made[method].glob("*.safetensors"))
    assert (found.format, found.weights) == ("gpt_oss", planned.weights)
    tensors = stored(made[method])
    shape = tensors["model.layers.1.mlp.experts.gate_up_proj_blocks"].shape
    assert shape == (EXPERTS, 2 * 96, 2, 16)
    assert not any(".experts.0." in name for name in tensors)


def test_interrupted_and_resumed_the_bytes_are_the_same(made: dict[str, Path], model: Path, tmp_path: Path) -> None:
    def stop(key: str, *_: int) -> None:
        if key == "layer-00001":
            raise Stop

    with pytest.raises(Stop):
        build(model, tmp_path / "out", RECIPES["gptq"], progress=stop)
    build(model, tmp_path / "out", RECIPES["gptq"], threads=1)
    assert folder_bytes(tmp_path / "out") == folder_bytes(made["gptq"])


def test_compensation_is_worth_it(made: dict[str, Path], model: Path) -> None:
    """The outputs of the layers, not the weights, are what it is nearer in."""
    with torch.no_grad():
        exact = load(model, backend="reference", dtype="float32")(IDS).logits
        errors = {name: load(made[name], backend="reference", dtype="float32")(IDS).logits - exact for name in made}
    assert float(errors["gptq"].square().mean()) < float(errors["rtn"].square().mean())


@pytest.mark.parametrize("method", RECIPES)
def test_transformers_computes_what_qconv_does(method: str, made: dict[str, Path]) -> None:
    theirs = UNTYPED.from_pretrained(made[method], dtype=torch.bfloat16).float()
    with torch.no_grad():
        ours = load(made[method], backend="reference", dtype="float32")(IDS).logits
        difference = theirs(IDS).logits - ours
    assert float(difference.abs().max() / ours.abs().max()) < 1e-5


def test_a_published_model_is_read_as_a_build(tmp_path: Path) -> None:
    folder = published(tmp_path / "model")
    assert inspect(folder).format == "gpt_oss"
    result = verify(folder)
    assert (result.problems, result.not_checked) == ([], [])
    theirs = UNTYPED.from_pretrained(folder, dtype=torch.bfloat16).float()
    with torch.no_grad():
        ours = load(folder, backend="reference", dtype="float32")(IDS).logits
        assert float((theirs(IDS).logits - ours).abs().max() / ours.abs().max()) < 1e-5
    source = Source.open(folder)
    assert len(source.checkpoint.entries) == len(dict(source.architecture.tensors()))


def test_damage_is_named_by_expert(made: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made["rtn"], tmp_path / "build"))
    (folder / "SHA256SUMS").unlink()
    name = "model.layers.1.mlp.experts.down_proj_scales"
    for file in folder.glob("*.safetensors"):
        from safetensors.torch import load_file, save_file

        tensors = load_file(file)
        if name in tensors:
            tensors[name][2, 5, 0] = 255
            save_file(tensors, file, metadata={"format": "pt"})
    assert any("layers.1.mlp.experts.2.down_proj: a scale is not finite" in one for one in verify(folder).problems)


def test_other_models_and_other_linears_are_refused(model: Path, moe: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match="format: gpt_oss is for models of gpt_oss: how its readers would store a qwen3_moe"
    ):
        build(moe, tmp_path / "out", RECIPES["rtn"])
    with pytest.raises(RecipeError, match="q_proj is to be quantized"):
        build(model, tmp_path / "out", small_recipe("rtn", "gpt_oss"))
    with pytest.raises(RecipeError, match=r"experts\.0\.gate_proj is not to be quantized"):
        build(model, tmp_path / "out", small_recipe("rtn", "gpt_oss", skip=["*.self_attn.*", "*.layers.0.mlp.*"]))
    assert not (tmp_path / "out").exists()


def test_the_packaged_recipe_is_calibrated_and_plans(model: Path) -> None:
    recipe = load_recipe("gpt-oss")
    assert recipe.method == ("gptq",)
    assert recipe.refine is not None
    planned = estimate(model, recipe)
    assert planned.output_bytes == estimate(model, RECIPES["rtn"]).output_bytes
    assert json.dumps(planned.classes[0].scheme)
