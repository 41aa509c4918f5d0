"""Builds in the layouts that qconv writes as sources: read as the weights that they stand for, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconv.artifacts.build import Build
from qconv.artifacts.coded import CodedCheckpoint
from qconv.artifacts.source import Source
from qconv.checkpoint import reader
from qconv.checkpoint.reader import Checkpoint
from qconv.conversion.pipeline import Wanted, convert
from qconv.errors import CheckpointError
from qconv.planning.estimate import estimate
from qconv.verification.build import verify
from tests.artifacts.test_source import edit_tensors
from tests.conftest import GRIDS, build, folder_bytes, random_model, save_model, small_recipe

MIXED = [{"match": "self_attn.*", "grid": "fp8-channel"}, {"match": "layers.1.mlp.experts.*", "grid": "mxfp8"}]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "awq": ("awq", {}),
    "gptq": ("gptq", {}),
    "mlx": ("mlx", {}),
    "mxfp4": ("mxfp4", {}),
    "mxfp8": ("mxfp8", {}),
    "nvfp4": ("nvfp4", {}),
    "nvfp4_w4a4": ("nvfp4_w4a4", {}),
    "nvfp4_modelopt": ("nvfp4_modelopt", {}),
    "w4afp8": ("w4afp8", {"rules": [{"match": "experts.*", "grid": "int4-g128"}]}),
    "w8a8": ("w8a8", {}),
    "mixed": ("nvfp4", {"rules": MIXED}),
    "part": ("nvfp4", {"skip": ["*.layers.0.*"]}),
}


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("coded")
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 64}
    model = save_model(random_model("qwen3_moe", **sizes), folder / "model")
    for name, (output_format, changes) in KINDS.items():
        grid = {"grid": GRIDS[output_format]} if output_format in GRIDS else {}
        build(model, folder / name, small_recipe("rtn", output_format, **grid, **changes))
    return {name: folder / name for name in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_it_reads_as_the_weights_that_it_stands_for(
    kind: str, builds: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "BLOCK_BYTES", 7 * 128 * 2)
    source, made = Source.open(builds[kind]), Build.open(builds[kind])
    assert isinstance(source.checkpoint, CodedCheckpoint)
    quantized = 0
    for layer in made.architecture.layers:
        for linear in layer.linears():
            found = source.read(linear.weight)
            assert found.dtype is torch.bfloat16
            assert torch.equal(torch.cat(list(source.blocks(linear.weight))), found)
            if made.is_quantized(linear):
                assert torch.equal(found, made.qtensor(linear).dequantize(torch.bfloat16)), linear.name
                quantized += 1
    assert quantized == (22 if kind == "part" else 44)
    (notice,) = source.notices()
    assert notice.startswith(f"{quantized} weights are codes of format ")


@pytest.mark.parametrize("kind", ["nvfp4_modelopt", "w8a8", "w4afp8", "mlx", "mixed"])
def test_a_build_from_it_is_the_dense_twins_to_the_byte(kind: str, builds: dict[str, Path], tmp_path: Path) -> None:
    convert(builds[kind], tmp_path / "dense", Wanted("bf16"), progress=lambda *_: None, log=lambda _: None)
    recipe = small_recipe("gptq")
    ours = build(builds[kind], tmp_path / "ours", recipe).out
    theirs = build(tmp_path / "dense", tmp_path / "theirs", recipe).out
    left, right = folder_bytes(ours), folder_bytes(theirs)
    shards = [name for name in left if name.endswith(".safetensors")]
    assert shards
    assert {name: left[name] for name in shards} == {name: right.get(name) for name in shards}
    assert verify(ours, builds[kind]).problems == []


@pytest.mark.parametrize("kind", KINDS)
def test_plan_counts_the_stored_bytes(kind: str, builds: dict[str, Path]) -> None:
    planned = estimate(builds[kind], small_recipe())
    assert planned.notices == ()
    assert planned.source_bytes == sum(entry.nbytes for entry in Checkpoint.open(builds[kind]).entries.values())


@pytest.mark.parametrize(
    ("kind", "leaf"), [("nvfp4", "weight_global_scale"), ("w8a8", "weight_scale"), ("w4afp8", "weight_scale_inv")]
)
def test_a_part_that_is_missing_is_named(kind: str, leaf: str, builds: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(builds[kind], tmp_path / "model"))
    name = f"model.layers.1.mlp.experts.2.up_proj.{leaf}"
    shard = next(file for file in folder.glob("model-*.safetensors") if name in load_file(file))
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, metadata={"format": "pt"})
    index = folder / reader.INDEX_NAME
    index.write_text(index.read_text().replace(f'"{name}": "{shard.name}",', ""))
    with pytest.raises(CheckpointError, match=f"{name}' is missing"):
        Source.open(folder)


def test_a_dense_checkpoint_that_says_that_it_has_codes(builds: dict[str, Path], tmp_path: Path) -> None:
    convert(builds["nvfp4"], tmp_path / "dense", Wanted("bf16"), progress=lambda *_: None, log=lambda _: None)
    shutil.copyfile(builds["nvfp4"] / "config.json", tmp_path / "dense" / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json says nvfp4, but no linear has codes"):
        Source.open(tmp_path / "dense")


def test_a_scale_that_is_no_number_is_met(builds: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(builds["mxfp4"], tmp_path / "model"))

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.experts.4.down_proj.weight_scale"][7] = 255

    edit_tensors(folder, damage)
    with pytest.raises(CheckpointError, match=r"experts\.4\.down_proj\.weight' holds 128 values that are not finite"):
        build(folder, tmp_path / "out", small_recipe())
