"""MLX on the CPU gives our numbers of what convert writes, bit for bit, mlx-lm loads it whole, and theirs are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconv.artifacts.build import Build
from qconv.artifacts.inspection import inspect
from qconv.conversion.pipeline import Wanted, convert
from qconv.formats.mlx import FORMAT, called
from qconv.runtime.loading import load
from qconv.verification.build import verify
from tests.conftest import build, random_model, save_model, small_recipe
from tests.interop.conftest import MODEL, Client

pytestmark = pytest.mark.interop

QUIET: dict[str, Any] = {"progress": lambda *_: None, "log": lambda _: None}
IDS = torch.arange(3, 99)
BOUND = 1e-3
"""Largest difference of a logit, relative to the largest: the order of float32 sums."""
SIZES = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128, "head_dim": 64}
MIXED = [
    {"match": "self_attn.*", "grid": "int8-g64", "method": "rtn"},
    {"match": "down_proj", "grid": "mxfp8"},
    {"match": "layers.0.mlp.experts.*.up_proj", "grid": {"bits": 6, "group_size": 32}},
]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mixtral": {"head_dim": 32},  # mlx-lm divides the hidden size by the heads
    "qwen2_moe": {"head_dim": 32, "shared_expert_intermediate_size": 64},
    "qwen3": {"tie_word_embeddings": True},
}


def asked(client: Client, folder: Path, where: Path) -> dict[str, Tensor]:
    """What MLX and mlx-lm make of a build."""
    save_file({"ids": IDS}, where / "ids.safetensors")
    client("mlx", "mlx_dequantize", folder, where / "ids.safetensors", where / "answer.safetensors")
    return load_file(where / "answer.safetensors")


def assert_same(folder: Path, theirs: dict[str, Tensor]) -> None:
    """Every module's numbers, codes of experts and of what is read as plain weights alike."""
    made, seen = Build.open(folder), set()
    linears = {linear.weight: linear for layer in made.architecture.layers for linear in layer.linears()}
    for name, _ in made.architecture.tensors():
        linear = linears.get(name)
        if linear is not None and made.is_quantized(linear):
            ours = made.qtensor(linear).dequantize()
        elif made.checkpoint.is_dequantized(name):
            ours = made.checkpoint.read(name)
        else:
            continue
        place = FORMAT.place(name)
        module = called(name).removesuffix(".weight")
        assert torch.equal(ours, theirs[module] if place is None else theirs[module][place.number]), name
        seen.add(module)
    assert seen == theirs.keys() - {"logits"}


def assert_computed_alike(model: Path, logits: Tensor) -> None:
    """In float32: a wrong name, or experts in another order, would move a logit by about its own size."""
    with torch.no_grad():
        ours = load(model, backend="reference", dtype="float32")(IDS[None]).logits[0]
    assert float((ours - logits).abs().max() / ours.abs().max()) < BOUND


@pytest.mark.parametrize(
    ("output_format", "grid"),
    [
        ("w4a16", {"group_size": 64}),
        ("w4a16", {"bits": 8, "group_size": 32}),
        ("gptq", {"bits": 3, "group_size": 128}),
        ("mxfp4", {"group_size": 32}),
        ("mxfp8", {"bits": 8, "group_size": 32}),
    ],
)
def test_what_convert_writes(output_format: str, grid: dict[str, int], client: Client, tmp_path: Path) -> None:
    build(MODEL, tmp_path / "build", small_recipe("rtn", output_format, grid=grid))
    convert(tmp_path / "build", tmp_path / "mlx", Wanted("mlx"), **QUIET)
    answer = asked(client, tmp_path / "mlx", tmp_path)
    assert_same(tmp_path / "mlx", answer)
    assert_computed_alike(tmp_path / "build", answer["logits"])
    assert_computed_alike(tmp_path / "mlx", answer["logits"])


@pytest.mark.parametrize("changes", [{}, {"rules": MIXED}], ids=["one grid", "several"])
def test_what_quantize_writes(changes: dict[str, Any], client: Client, tmp_path: Path) -> None:
    build(MODEL, tmp_path / "mlx", small_recipe("gptq", "mlx", grid={"group_size": 64}, **changes))
    answer = asked(client, tmp_path / "mlx", tmp_path)
    assert_same(tmp_path / "mlx", answer)
    assert_computed_alike(tmp_path / "mlx", answer["logits"])


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, client: Client, tmp_path: Path) -> None:
    model = save_model(random_model(family, **SIZES | FAMILIES[family]), tmp_path / "model")
    build(model, tmp_path / "build", small_recipe("rtn", "w4a16", grid={"bits": 8, "group_size": 32}))
    convert(tmp_path / "build", tmp_path / "mlx", Wanted("mlx"), **QUIET)
    answer = asked(client, tmp_path / "mlx", tmp_path)
    assert_same(tmp_path / "mlx", answer)
    assert_computed_alike(tmp_path / "build", answer["logits"])


@pytest.mark.parametrize(
    ("mode", "bits", "group"),
    [("affine", 4, 64), ("affine", 6, 32), ("affine", 3, 128), ("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)],
)
def test_what_mlx_lm_writes(mode: str, bits: int, group: int, client: Client, tmp_path: Path) -> None:
    build(MODEL, tmp_path / "build", small_recipe("rtn", "w4a16", grid={"bits": 8, "group_size": 32}))
    convert(tmp_path / "build", tmp_path / "dense", Wanted("bf16"), **QUIET)
    client("mlx", "mlx_dequantize", "make", tmp_path / "dense", tmp_path / "theirs", mode, bits, group)
    answer = asked(client, tmp_path / "theirs", tmp_path)
    assert_same(tmp_path / "theirs", answer)
    result = verify(tmp_path / "theirs", tmp_path / "dense")
    assert (result.problems, result.not_checked) == ([], [])
    assert inspect(tmp_path / "theirs").format == "mlx"
    assert_computed_alike(tmp_path / "theirs", answer["logits"])
    convert(tmp_path / "theirs", tmp_path / "again", Wanted("f32"), **QUIET)
    assert_computed_alike(tmp_path / "again", answer["logits"])
