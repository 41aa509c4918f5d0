"""compressed-tensors and ModelOpt decode our NVFP4, MXFP4 and MXFP8 to our bits, and we theirs, rounded inputs too.

Our global scales are powers of two, so that products have at most six significant bits: bfloat16, in which
compressed-tensors decompresses, holds all of them. Their own are any float32, and are compared in float32 too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from qconv.artifacts.build import Build
from qconv.core.qtensor import QTensor
from qconv.formats import detect, get_format
from qconv.formats.float4 import NVFP4
from qconv.grids.nearest import E2M1, E4M3
from qconv.runtime.grouped_activations import MicroscalingRounding, Nvfp4Rounding
from tests.interop.conftest import Client

pytestmark = pytest.mark.interop

PRESETS = ("NVFP4A16", "NVFP4", "MXFP4A16", "MXFP4", "MXFP8A16", "MXFP8")
MIXTURE: dict[str, Any] = {
    "format": "nvfp4_w4a4",
    "method": "rtn",
    "grid": {"bits": 4, "group_size": 16},
    "rules": [
        {"match": "layers.0.self_attn.*", "grid": "mxfp8"},
        {"match": "layers.1.self_attn.*", "grid": "fp8-block"},
        {"match": "self_attn.o_proj", "grid": "int8-channel"},
        {"match": "layers.2.mlp.experts.*", "grid": "mxfp4"},
    ],
}


def assert_decompressed(made: Path, client: Client, answer: Path) -> set[str]:
    client("compressed-tensors", "compressed_tensors_groups", made, answer)
    theirs, kinds, opened = load_file(answer), set[str](), Build.open(made)
    linears = [linear for layer in opened.architecture.layers for linear in layer.linears()]
    for linear in linears:
        ours, found = opened.qtensor(linear), theirs.pop(linear.name)
        kinds.add(f"{ours.grid.number} {ours.grid.group_size}")
        assert_same(found, ours, linear.name)
        if found.dtype == torch.bfloat16:
            assert torch.equal(found.float(), ours.dequantize()), linear.name
    assert not theirs
    return kinds


def assert_same(theirs: Tensor, ours: QTensor, name: str) -> None:
    dense = ours.dequantize(theirs.dtype)
    zeros = (theirs == 0.0) & (dense == 0.0)  # of either sign
    assert torch.equal(torch.where(zeros, 0.0, theirs), torch.where(zeros, 0.0, dense)), name


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("fmt", ["nvfp4", "nvfp4-w4a4", "mxfp4", "mxfp8"])
def test_it_decompresses_our_weights_bit_for_bit(
    build: Callable[[str, str], Path], client: Client, tmp_path: Path, fmt: str, method: str
) -> None:
    kinds = {"nvfp4": "e2m1 16", "nvfp4-w4a4": "e2m1 16", "mxfp4": "e2m1 32", "mxfp8": "e4m3 32"}
    assert assert_decompressed(build(fmt, method), client, tmp_path / "unpacked") == {kinds[fmt]}


def test_it_gives_every_linear_of_a_mixture_its_scheme(
    build_recipe: Callable[[dict[str, Any]], Path], client: Client, tmp_path: Path
) -> None:
    kinds = assert_decompressed(build_recipe(MIXTURE), client, tmp_path / "unpacked")
    assert kinds == {"e4m3 32", "e4m3 128", "int -1", "e2m1 16", "e2m1 32"}


@pytest.fixture(scope="module")
def theirs(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear by each of its presets."""
    folder = tmp_path_factory.mktemp("presets")
    client("compressed-tensors", "compressed_tensors_fp4", ",".join(PRESETS), folder)
    return folder


@pytest.mark.parametrize("preset", PRESETS)
def test_we_read_its_own_bit_for_bit(theirs: Path, preset: str) -> None:
    tensors, answer = load_file(theirs / f"{preset}.safetensors"), load_file(theirs / f"{preset}.answer.safetensors")
    with safe_open(theirs / f"{preset}.safetensors", "pt") as file:
        section = json.loads(file.metadata()["section"])
    found = detect({"quantization_config": section})
    assert found is not None
    grid = found.read_config(section, torch.bfloat16).grid
    assert {spec.name for spec in found.specs("m", 96, 128, grid)} == tensors.keys()
    weight = found.unpack("m", (96, 128), tensors.__getitem__, grid)
    assert_same(answer["weight"], weight, preset)
    assert_same(answer["weight.float32"], weight, preset)
    # What we would write of it is what it wrote.
    for name, tensor in found.pack("m", weight):
        assert torch.equal(tensor.view(torch.uint8), tensors[name].view(torch.uint8)), name
    (group,), (own,) = (one["config_groups"].values() for one in (section, found.config({grid: []}, [])))
    for part in ("weights", "input_activations"):
        assert (group[part] is None) == (own[part] is None)
        for key, value in (own[part] or {}).items():
            assert group[part][key] == value, key


@pytest.mark.parametrize("preset", ["NVFP4", "MXFP4", "MXFP8"])
def test_inputs_are_rounded_as_it_rounds_them(theirs: Path, preset: str) -> None:
    answer = load_file(theirs / f"{preset}.answer.safetensors")
    if preset == "NVFP4":
        scale = load_file(theirs / f"{preset}.safetensors")["m.input_global_scale"].double().reciprocal()
        rounded = Nvfp4Rounding(scale=scale)(answer["inputs"])
    else:
        rounded = MicroscalingRounding(32, floats=E2M1 if preset == "MXFP4" else E4M3)(answer["inputs"])
    assert torch.equal(rounded, answer["rounded"])


def test_modelopt_dequantizes_our_weights_and_we_its_own(
    build: Callable[[str, str], Path], client: Client, tmp_path: Path
) -> None:
    made = build("nvfp4-modelopt", "gptq")
    client("modelopt", "modelopt_nvfp4", made, tmp_path / "answer", tmp_path / "own")
    theirs, opened = load_file(tmp_path / "answer"), Build.open(made)
    for layer in opened.architecture.layers:
        for linear in layer.linears():
            assert_same(theirs.pop(linear.name), opened.qtensor(linear), linear.name)
    assert not theirs
    own = load_file(tmp_path / "own")
    weight = get_format("nvfp4_modelopt").unpack("m", (48, 96), own.__getitem__, NVFP4)
    assert_same(own["dense"], weight, "ModelOpt's own")
    for name, tensor in get_format("nvfp4_modelopt").pack("m", weight):
        assert torch.equal(tensor.view(-1).view(torch.uint8), own[name].view(-1).view(torch.uint8)), name
