"""A calibrated build as a whole: experts without tokens, threads, windows, and what the report says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qconv.planning.recipe import Recipe
from qconv.verification.build import verify
from tests.conftest import build, folder_bytes, random_model, save_model, small_recipe

SILENT = 3
"""The expert that no token is sent to."""


@pytest.fixture(scope="session")
def one_silent_expert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A top-1 MoE one of whose router rows is the mean of two others, so that it never wins."""
    model = random_model("qwen3_moe", num_experts_per_tok=1)
    for layer in model.model.layers:
        weight = layer.mlp.gate.weight
        with torch.no_grad():
            weight[SILENT] = (weight[0] + weight[1]) / 2
    return save_model(model, tmp_path_factory.mktemp("silent") / "model")


def recipe(**calibration: Any) -> Recipe:
    """AWQ on few tokens."""
    return small_recipe("awq", "awq", calibration=calibration)


@pytest.mark.parametrize("shrinkage", [0, 16])
def test_an_expert_without_tokens_gets_a_sound_result_and_is_reported(
    one_silent_expert: Path, tmp_path: Path, shrinkage: int
) -> None:
    out = tmp_path / "out"
    report = build(one_silent_expert, out, recipe(shrinkage_tokens=shrinkage)).report
    for layer in report["layers"]:
        record = next(one for one in layer["experts"] if one["module"].endswith(f"experts.{SILENT}"))
        assert record["tokens"] == 0
        assert record["shrinkage"] == (1.0 if shrinkage else 0.0)
        assert torch.isfinite(torch.tensor([record["loss"], record["rtn_loss"]])).all()
        # Calibrated on the layer's tokens as a whole, not rounded blindly: the loss was measured on something.
        assert 0.0 < record["loss"] <= record["rtn_loss"]
    assert report["coverage"]["without_tokens"] >= len(report["layers"])
    assert report["coverage"]["least"] == 0
    assert f"experts.{SILENT}" in str(report["coverage"]["weakest"])
    card = (out / "README.md").read_text()
    assert "experts saw no token" in card
    result = verify(out, one_silent_expert)
    assert result.problems == []
    assert min(result.snr_db.values()) > 10  # 4 bits give about 20 dB; an expert made of noise gives none


def test_every_token_is_counted_and_the_shrinkage_is_k_over_n_plus_k(moe: Path, awq_build: Path) -> None:
    report = json.loads((awq_build / "qconv-report.json").read_text())
    settings = report["recipe"]["calibration"]
    k, top_k = settings["shrinkage_tokens"], 2
    for layer in report["layers"]:
        assert sum(one["tokens"] for one in layer["experts"]) == settings["tokens"] * top_k
        for one in layer["experts"]:
            assert one["calibration_tokens"] == one["tokens"]
            assert one["shrinkage"] == pytest.approx(k / (one["tokens"] + k), abs=1e-5)


def test_with_all_experts_each_sees_every_token_but_counts_its_own(moe: Path, tmp_path: Path) -> None:
    report = build(moe, tmp_path / "out", recipe(routing="all-experts")).report
    for layer in report["layers"]:
        assert {one["calibration_tokens"] for one in layer["experts"]} == {128}
        assert sum(one["tokens"] for one in layer["experts"]) == 128 * 2


def test_no_search_ends_worse_than_plain_rounding(awq_build: Path) -> None:
    report = json.loads((awq_build / "qconv-report.json").read_text())
    searches = [search for layer in report["layers"] for search in layer["searches"].values()]
    assert searches
    for search in searches:
        assert search["loss"] <= search["rtn_loss"]
        assert search["kept_rtn"] == (search["loss"] == search["rtn_loss"])
    mlps = [mlp for layer in report["layers"] for mlp in layer["experts"]]
    # The scale of the norm is chosen for all experts together; each may lose a little, all of them must gain.
    assert sum(mlp["loss"] for mlp in mlps) < sum(mlp["rtn_loss"] for mlp in mlps)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3"])
def test_bytes_do_not_depend_on_threads(model_type: str, tmp_path: Path) -> None:
    model = save_model(random_model(model_type), tmp_path / "model")
    one = folder_bytes(build(model, tmp_path / "1", recipe(), threads=1).out)
    for threads in (2, 3):
        assert folder_bytes(build(model, tmp_path / str(threads), recipe(), threads=threads).out) == one


def test_the_seed_changes_the_build_and_only_the_seed(moe: Path, awq_build: Path, tmp_path: Path) -> None:
    again = folder_bytes(build(moe, tmp_path / "again", recipe()).out)
    assert again == folder_bytes(awq_build)
    other = folder_bytes(build(moe, tmp_path / "other", recipe(seed=1)).out)
    assert any(other[name] != again[name] for name in again if name.endswith(".safetensors"))
