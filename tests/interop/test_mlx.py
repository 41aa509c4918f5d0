"""MLX on the CPU gives our numbers of what convert writes, bit for bit, mlx-lm loads it whole, and theirs are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconv.conversion.mlx import stacked
from qconv.conversion.mlx_weights import MlxWeights
from qconv.conversion.pipeline import Wanted, convert
from qconv.runtime.loading import load
from tests.conftest import build, random_model, save_model, small_recipe
from tests.interop.conftest import MODEL, Client

pytestmark = pytest.mark.interop

QUIET: dict[str, Any] = {"progress": lambda *_: None, "log": lambda _: None}
IDS = torch.arange(3, 99)
BOUND = 1e-3
"""Largest difference of a logit, relative to the largest: the order of float32 sums."""
SIZES = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128, "head_dim": 64}
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


def assert_same(ours: MlxWeights, theirs: dict[str, Tensor]) -> None:
    seen = set()
    for name, place in ours.places.items():
        if place.mode is None:
            continue
        module, expert = stacked(name.rpartition(".")[0])
        wanted = theirs[module] if expert is None else theirs[module][expert]
        assert torch.equal(ours.read(name), wanted), name
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
    assert_same(MlxWeights.of(tmp_path / "mlx", None), answer)
    assert_computed_alike(tmp_path / "build", answer["logits"])


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, client: Client, tmp_path: Path) -> None:
    model = save_model(random_model(family, **SIZES | FAMILIES[family]), tmp_path / "model")
    build(model, tmp_path / "build", small_recipe("rtn", "w4a16", grid={"bits": 8, "group_size": 32}))
    convert(tmp_path / "build", tmp_path / "mlx", Wanted("mlx"), **QUIET)
    answer = asked(client, tmp_path / "mlx", tmp_path)
    assert_same(MlxWeights.of(tmp_path / "mlx", None), answer)
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
    assert_same(MlxWeights.of(tmp_path / "theirs", None), answer)
    convert(tmp_path / "theirs", tmp_path / "again", Wanted("f32"), **QUIET)
    assert_computed_alike(tmp_path / "again", answer["logits"])
