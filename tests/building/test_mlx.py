"""Builds in MLX's layout: made, killed and resumed, verified, planned, run; each linear in its own bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qconv.artifacts.build import Build
from qconv.artifacts.inspection import inspect
from qconv.errors import RecipeError
from qconv.planning.estimate import estimate
from qconv.runtime.loading import load
from qconv.verification.build import verify
from tests.building.test_pipeline import Stop
from tests.building.test_verbatim import glm as glm
from tests.conftest import build, folder_bytes, small_recipe
from tests.models.discovery.test_discovered_builds import source as source

REFINED = {"refine": {"sweeps": 1, "refits": 1}, "calibration": {"propagate": "matched"}}
MIXED = [
    {"match": "self_attn.*", "grid": "int8-g32", "method": "rtn"},
    {"match": "layers.1.mlp.experts.*.down_proj", "grid": "mxfp8"},
    {"match": "layers.1.mlp.experts.*.up_proj", "grid": "skip"},
    {"match": "gate_proj", "grid": {"bits": 6, "group_size": 32}},
]
RECIPES = {
    "rtn": small_recipe("rtn", "mlx"),
    "awq": small_recipe("awq", "mlx"),
    "gptq": small_recipe("gptq", "mlx", **REFINED),
    "mixed": small_recipe("gptq", "mlx", rules=MIXED, **REFINED),
}
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def made(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mlx")
    return {name: build(moe, folder / name, recipe).out for name, recipe in RECIPES.items()}


@pytest.mark.parametrize("kind", RECIPES)
def test_a_build_verifies_and_is_as_large_as_planned(kind: str, made: dict[str, Path], moe: Path) -> None:
    for against in (None, moe):
        result = verify(made[kind], against)
        assert (result.problems, result.notices, result.not_checked) == ([], [], [])
    planned, found = estimate(moe, RECIPES[kind]), inspect(made[kind])
    assert planned.output_bytes == sum(file.stat().st_size for file in made[kind].glob("*.safetensors"))
    assert (found.format, found.weights) == ("mlx", planned.weights)
    with safe_open(made[kind] / "model-00002-of-00004.safetensors", "pt") as file:
        assert file.metadata() == {"format": "mlx"}
        assert file.get_slice("model.layers.0.mlp.switch_mlp.up_proj.weight").get_shape() == [6, 32, 8]


@pytest.mark.parametrize("kind", ["gptq", "mixed"])
def test_interrupted_and_resumed_the_bytes_are_the_same(
    kind: str, made: dict[str, Path], moe: Path, tmp_path: Path
) -> None:
    def stop(key: str, *_: int) -> None:
        if key == "layer-00001":
            raise Stop

    with pytest.raises(Stop):
        build(moe, tmp_path / "out", RECIPES[kind], progress=stop)
    build(moe, tmp_path / "out", RECIPES[kind], threads=1)
    assert folder_bytes(tmp_path / "out") == folder_bytes(made[kind])


def test_each_linear_is_in_its_own_mode(made: dict[str, Path]) -> None:
    section = json.loads((made["mixed"] / "config.json").read_text())["quantization"]
    experts = "model.layers.1.mlp.switch_mlp"
    assert section[f"{experts}.down_proj"] == {"group_size": 32, "bits": 8, "mode": "mxfp8"}
    assert section["model.layers.0.mlp.switch_mlp.gate_proj"] == {"group_size": 32, "bits": 6, "mode": "affine"}
    assert f"{experts}.up_proj" not in section
    opened = Build.open(made["mixed"])
    up = opened.architecture.layers[1].mlps()[4].up
    assert not opened.is_quantized(up)
    assert opened.checkpoint.entry(up.weight).shape == (up.out_features, up.in_features)


def test_experts_of_a_layer_that_lie_in_one_tensor_have_one_grid(moe: Path, tmp_path: Path) -> None:
    one = [{"match": "layers.0.mlp.experts.2.up_proj", "grid": "int8-g32"}]
    with pytest.raises(RecipeError, match=r"engines load model\.layers\.0\.mlp\.switch_mlp\.up_proj of layer 0 as one"):
        build(moe, tmp_path / "out", small_recipe("rtn", "mlx", rules=one))
    with pytest.raises(RecipeError, match=r"experts\.2\.up_proj is skipped but others"):
        build(moe, tmp_path / "out", small_recipe("rtn", "mlx", skip=["*.layers.0.mlp.experts.2.up_proj"]))


@pytest.mark.parametrize("kind", RECIPES)
def test_it_runs_as_the_dense_weights_that_it_stands_for(kind: str, made: dict[str, Path]) -> None:
    with torch.no_grad():
        packed = load(made[kind], backend="reference", dtype="float32")(IDS).logits
        compiled = load(made[kind], dtype="float32")(IDS).logits
    assert float((packed - compiled).abs().max() / packed.abs().max()) < 1e-4


def test_what_other_formats_copy_beside_the_model_is_left_out_and_said(glm: Path, tmp_path: Path) -> None:
    logged: list[str] = []
    build(glm, tmp_path / "out", RECIPES["rtn"], log=logged.append)
    assert any("MTP" in line and "are left out" in line for line in logged)
    assert not any(name.startswith("model.layers.3.") for name in Build.open(tmp_path / "out").checkpoint.entries)
    result = verify(tmp_path / "out", glm)
    assert (result.problems, result.notices) == ([], [])
