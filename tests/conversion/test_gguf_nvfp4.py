"""NVFP4 in GGUF: its scales beside the blocks, there and back, computed with, and refused where they make no sense."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

from qconv.artifacts.build import Build
from qconv.core.qtensor import QTensor
from qconv.errors import CheckpointError, UsageError
from qconv.formats.gguf.reader import GgufModel
from qconv.runtime.gguf_files import GgufFiles
from qconv.runtime.packed import BlockWeight
from qconv.verification.build import verify
from qconv.verification.gguf import verify_gguf
from tests.conftest import build, random_model, save_model, small_recipe
from tests.conversion.test_gguf_pairs import SIZES, converted, held
from tests.verification.test_gguf import overwrite

NVFP4 = GGMLQuantizationType.NVFP4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of which each expert has weights of another size, and so a global scale of its own."""
    model = random_model("qwen3_moe", **SIZES)
    for name, weight in model.named_parameters():
        if ".experts." in name and weight.dim() == 3:
            weight.data *= 2.0 ** (torch.arange(len(weight)).view(-1, 1, 1) % 3)
    return save_model(model, tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module", params=["nvfp4", "nvfp4_modelopt"])
def made(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    build(source, folder / "build", small_recipe("rtn", request.param, grid={"group_size": 16}))
    converted(folder / "build", folder / "gguf", "gguf:NVFP4")
    return folder


def test_scales_stand_beside_the_weights_one_of_each_expert(made: Path) -> None:
    model, dense = GgufModel.open(made / "gguf"), Build.open(made / "build")
    assert model.metadata["general.file_type"] == 39
    assert model.entries["blk.0.ffn_up_exps.weight"].type is NVFP4
    experts = model.entries["blk.0.ffn_up_exps.weight"].shape[0]
    assert model.entries["blk.0.ffn_up_exps.scale"].shape == (experts,)
    assert model.entries["blk.1.attn_q.scale"].shape == (1,)
    linears = {one.name: one for layer in dense.architecture.layers for one in layer.linears()}
    scales = model.scales_of("blk.0.ffn_up_exps.weight")
    assert scales == tuple(
        dense.qtensor(linears[f"model.layers.0.mlp.experts.{n}.up_proj"]).global_scale for n in range(experts)
    )
    assert len(set(scales)) > 1, "else one of them could stand for all"
    assert model.beside("output_norm.weight") == []


def test_it_comes_back_code_by_code(made: Path, tmp_path: Path) -> None:
    outcome = converted(made / "gguf", tmp_path / "back", "compressed-tensors", like=made / "build")
    assert outcome.report["converted"]["rounded_again"] == {}
    before, after = Build.open(made / "build"), Build.open(tmp_path / "back")
    for layer in before.architecture.layers:
        for linear in layer.linears():
            one, other = before.qtensor(linear), after.qtensor(linear)
            assert torch.equal(one.codes, other.codes), linear.name
            assert torch.equal(one.scales.view(torch.uint8), other.scales.view(torch.uint8)), linear.name
            assert one.global_scale == other.global_scale
    assert not verify(tmp_path / "back", None).problems
    converted(tmp_path / "back", tmp_path / "again", "gguf")
    assert (held_bytes(tmp_path / "again")) == held_bytes(made / "gguf")


def held_bytes(folder: Path) -> dict[str, bytes]:
    """What every tensor of a file is made of."""
    model = GgufModel.open(folder)
    return {name: b"".join(block.numpy().tobytes() for block in model.blocks(name)) for name in model.entries}


def test_the_runtime_computes_with_both_scales(made: Path, source: Path) -> None:
    files, dense, values = GgufFiles.open(made / "gguf"), Build.open(made / "build"), held(made / "gguf")
    for layer in dense.architecture.layers:
        for linear in layer.linears():
            weight = files.weight(linear)
            assert isinstance(weight, BlockWeight)
            stored = dense.qtensor(linear)
            assert isinstance(stored, QTensor)
            assert torch.equal(weight.dequantize(torch.float32), stored.dequantize()), linear.name
            shape = (linear.out_features, linear.in_features)
            assert torch.equal(files.values(linear.weight, shape, 3, 5), stored.dequantize()[3:5])
    streamed = torch.cat(list(GgufModel.open(made / "gguf").dequantized("blk.0.ffn_up_exps.weight")))
    assert torch.equal(streamed, values["blk.0.ffn_up_exps.weight"].flatten(0, 1))
    found = verify_gguf(made / "gguf", source)
    assert found.problems == []
    assert found.snr_db["blk.0.ffn_up_exps.weight"] > 15.0


def test_a_global_scale_that_is_no_scale_is_refused(made: Path, tmp_path: Path) -> None:
    model = GgufModel.open(made / "gguf")
    entry = model.entry("blk.0.ffn_up_exps.scale")
    copy = tmp_path / "copy.gguf"
    for bad in (float("nan"), -1.0, 0.0):
        copy.write_bytes(model.files[0].read_bytes())
        overwrite(copy, entry.offset, struct.pack("<f", bad))
        with pytest.raises(CheckpointError, match=r"ffn_up_exps\.scale is no positive number"):
            GgufFiles.open(copy)


def test_a_scale_of_too_few_experts_is_refused(made: Path) -> None:
    model = GgufModel.open(made / "gguf")
    entry = model.entries["blk.0.ffn_up_exps.scale"]
    short = dataclasses.replace(entry, shape=(2,), nbytes=8)
    changed = dataclasses.replace(model, entries=model.entries | {entry.name: short})
    whole = model.scales_of("blk.0.ffn_up_exps.weight")
    assert whole is not None
    assert changed.scales_of("blk.0.ffn_up_exps.weight") == whole[:2]


def test_nothing_is_rounded_to_nvfp4(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "build", small_recipe("rtn", "w4a16", grid={"group_size": 32}))
    with pytest.raises(UsageError, match="NVFP4 holds E2M1 floats"):
        converted(tmp_path / "build", tmp_path / "out", "gguf:NVFP4")
    assert not (tmp_path / "out").exists()
