"""Builds whose weights are compensated: FP8, integers with refinement, and matched calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qconv.building.committer import UnitWriter
from qconv.calibration.schemes import SecondMoments
from qconv.core.settings import MOST_MOVED
from qconv.errors import RecipeError
from qconv.planning.recipe import Recipe, parse_recipe
from qconv.verification.build import verify
from tests.conftest import build, folder_bytes, random_model, save_model, small_recipe

REFINE = {"sweeps": 1, "refits": 1}
MATCHED = {"tokens": 128, "sequence_length": 32, "propagate": "matched"}
KINDS: dict[str, Recipe] = {
    "blocks": small_recipe("gptq", "fp8", grid={"bits": 8, "group_size": 128}),
    "rows": small_recipe("gptq", "fp8_dynamic", grid={"bits": 8, "group_size": -1}, refine=REFINE),
    "refined": small_recipe("gptq", "w4a16", grid={"bits": 4, "group_size": 32}, refine=REFINE),
    "in act order": small_recipe(
        "gptq", "gptq", grid={"bits": 4, "group_size": 32}, gptq={"ordering": "desc_act"}, refine=REFINE
    ),
    "matched": small_recipe(
        "gptq", "awq", grid={"bits": 4, "group_size": 32}, calibration=MATCHED, refine={"sweeps": 1, "refits": 0}
    ),
    "folded and matched": small_recipe(
        "awq+gptq", "w4a16", grid={"bits": 4, "group_size": 32}, calibration=MATCHED, refine=REFINE
    ),
}


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random sparse model of whole blocks of 128, which is as small as blocks allow; do not write to it."""
    sizes = {"hidden_size": 128, "head_dim": 32, "num_key_value_heads": 4, "moe_intermediate_size": 128}
    return save_model(random_model("qwen3_moe", **sizes), tmp_path_factory.mktemp("whole") / "model", "900KB")


@pytest.mark.parametrize("kind", KINDS)
def test_it_verifies_and_no_linear_is_worse_than_rounded(kind: str, moe: Path, tmp_path: Path) -> None:
    report = build(moe, tmp_path / "out", KINDS[kind]).report
    assert verify(tmp_path / "out", moe).problems == []
    records = [one for layer in report["layers"] for one in layer["compensations"].values()]
    assert records
    assert all(one["error"] <= one["rtn_error"] for one in records)
    # 128 tokens leave inputs of 128 features correlated: half the error is the least that is to be had.
    assert sum(one["error"] for one in records) < 0.5 * sum(one["rtn_error"] for one in records)


@pytest.mark.parametrize("kind", ["rows", "folded and matched"])
def test_stopped_after_a_layer_or_on_other_threads_the_bytes_are_the_same(
    kind: str, moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = folder_bytes(build(moe, tmp_path / "whole", KINDS[kind], threads=1).out)
    assert folder_bytes(build(moe, tmp_path / "threads", KINDS[kind], threads=3).out) == whole
    real, stops = UnitWriter.commit, iter(range(2))

    def commit(self: Any, *arguments: Any) -> Any:
        if next(stops, None) is None:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(UnitWriter, "commit", commit)
    with pytest.raises(KeyboardInterrupt):
        build(moe, tmp_path / "stopped", KINDS[kind])
    monkeypatch.undo()
    assert folder_bytes(build(moe, tmp_path / "stopped", KINDS[kind]).out) == whole


def test_refinement_lowers_the_error_and_changes_scales(moe: Path, tmp_path: Path) -> None:
    plain = KINDS["refined"].model_copy(update={"refine": parse_recipe({}).refine})
    errors, scales = [], []
    for name, recipe in (("plain", plain), ("refined", KINDS["refined"])):
        made = build(moe, tmp_path / name, recipe)
        records = made.report["layers"][0]["compensations"]
        errors.append(records["model.layers.0.self_attn.q_proj"]["error"])
        tensors = {key: value for file in made.out.glob("*.safetensors") for key, value in load_file(file).items()}
        scales.append(tensors["model.layers.0.self_attn.q_proj.weight_scale"])
    assert errors[1] < errors[0]
    assert not torch.equal(*scales)


def test_a_matched_target_gives_the_true_output_on_drifted_inputs() -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    true = drawn(400, 24) @ drawn(24, 24)
    drifted = true + 0.3 * drawn(400, 24)
    weight = 5.0 + drawn(8, 24)  # so that the target is near enough
    recipe = small_recipe("gptq", calibration={**MATCHED, "matched_strength": 1.0}, gptq={"damp_percent": 1e-7})
    moments, pull = SecondMoments(drifted.T @ drifted / 400, recipe), weight @ ((true - drifted).T @ drifted / 400)
    best = torch.linalg.lstsq(drifted.double(), (true @ weight.T).double()).solution.T
    torch.testing.assert_close(moments.target(weight, pull).double(), best, rtol=1e-3, atol=1e-3)
    half = small_recipe("gptq", calibration={**MATCHED, "matched_strength": 0.5}, gptq={"damp_percent": 1e-7})
    moved = SecondMoments(moments.hessian, half).target(weight, pull)
    torch.testing.assert_close(moved, (weight + moments.target(weight, pull)) / 2, rtol=1e-3, atol=1e-4)
    assert SecondMoments(moments.hessian, recipe).target(weight, None) is weight


def test_no_row_moves_far() -> None:
    """With fewer tokens than inputs the least squares can ask for anything."""
    generator = torch.Generator().manual_seed(0)
    true, noise = torch.randn(8, 24, generator=generator), torch.randn(8, 24, generator=generator)
    drifted, weight = true + noise, torch.randn(6, 24, generator=generator)
    recipe = small_recipe("gptq", calibration=MATCHED, gptq={"damp_percent": 1e-7})
    moments, pull = SecondMoments(drifted.T @ drifted / 8, recipe), weight @ ((true - drifted).T @ drifted / 8)
    moved = (moments.target(weight, pull) - weight).norm(dim=1) / weight.norm(dim=1)
    assert float(moved.max()) == pytest.approx(MOST_MOVED, rel=1e-4)


def test_matched_calibration_is_for_gptq() -> None:
    with pytest.raises(RecipeError, match="propagate: matched is for gptq, not for awq"):
        parse_recipe({"method": "awq", "calibration": {"propagate": "matched"}})
