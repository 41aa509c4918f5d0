"""Blame: a damaged part of a build is found, in every coordinate system that a build may have folded itself into."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconv.build import Build
from qconv.evaluation.blame import Blame, find_blame
from qconv.folding import Folds
from qconv.models.base import Layer
from qconv.runtime.files import open_files
from tests.conftest import build, small_recipe

SEQUENCES = [torch.randint(3, 2048, (48,), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def change(folder: Path, name: str, edit: Callable[[Tensor], Tensor]) -> None:
    """Replace one tensor of a checkpoint."""
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            metadata, names = file.metadata(), set(file.keys())
        if name in names:
            tensors = load_file(shard)
            tensors[name] = edit(tensors[name]).contiguous()
            save_file(tensors, shard, metadata)
            return
    raise AssertionError(f"no tensor {name}")


def blame(model: Path, made: Path) -> Blame:
    opened = Build.open(made)

    def folds(layer: Layer) -> Folds:
        return Folds.of(opened.architecture, layer, opened.fold_scales(layer))

    return find_blame(open_files(model), open_files(made), folds, SEQUENCES, worst_layers=1, progress=lambda *_: None)


@pytest.fixture(params=["rtn_build", "awq_build"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A build to be damaged: with nothing folded, and with AWQ's scales folded."""
    return Path(shutil.copytree(request.getfixturevalue(request.param), tmp_path / "build"))


def test_a_damaged_expert_is_named(moe: Path, made: Path) -> None:
    scales = "weight_scale" if Build.open(made).format.name == "w4a16" else "scales"
    change(made, f"model.layers.0.mlp.experts.3.down_proj.{scales}", lambda scale: -scale)
    found = blame(moe, made)
    assert found.layers[0].part.name == "model.layers.0"
    assert found.parts[0].part.name == "model.layers.0.mlp.experts.3"
    assert found.parts[0].kld > 2 * found.parts[1].kld
    assert found.whole.kld >= 0.5 * found.layers[0].kld


def test_a_damaged_layer_is_named(moe: Path, tmp_path: Path) -> None:
    # At 8 bits, where either layer's rounding costs little.
    made = build(moe, tmp_path / "build", small_recipe(grid={"bits": 8})).out
    healthy = blame(moe, made).layers[0].part.layer
    other = 1 - int(healthy or 0)
    change(made, f"model.layers.{other}.mlp.experts.3.down_proj.weight_scale", torch.zeros_like)
    found = blame(moe, made)
    assert found.layers[0].part.name == f"model.layers.{other}"
    assert found.parts[0].part.name == f"model.layers.{other}.mlp.experts.3"


def test_a_permuted_router_is_named(moe: Path, made: Path) -> None:
    change(made, "model.layers.0.mlp.gate.weight", lambda weight: weight.roll(1, 0))
    found = blame(moe, made)
    assert found.layers[0].part.name == "model.layers.0"
    assert found.parts[0].part.name == "model.layers.0.mlp.gate"


def test_a_part_costs_nothing_where_it_is_the_reference(moe: Path, made: Path) -> None:
    found = blame(moe, made)
    costs = {one.part.name: one.kld for one in found.parts}
    router = next(cost for name, cost in costs.items() if name.endswith("mlp.gate"))
    # Not quantized, and folding it by powers of two is exact: only float32's own rounding is left.
    assert abs(router) < 1e-5
    assert abs(costs[f"model.layers.{found.parts[0].part.layer} norms"]) < 1e-5
    outside = [one.kld for one in found.layers if one.part.layer is None]
    assert len(outside) == 2
    assert max(map(abs, outside)) < 1e-9
    assert found.whole.kld > 0.0
    assert found.tokens == 3 * 48


def test_the_reference_against_itself_costs_nothing(moe: Path) -> None:
    files = open_files(moe)
    found = find_blame(files, files, lambda _: Folds.none(), SEQUENCES, progress=lambda *_: None)
    assert found.whole.kld == 0.0
    assert {one.kld for one in (*found.layers, *found.parts)} == {0.0}
