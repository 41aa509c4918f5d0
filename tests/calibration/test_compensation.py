"""GPTQ in a calibrated build: whose Hessian rounds what, with AWQ before it, in every family, with any threads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qconv.artifacts.build import Build
from qconv.calibration import attention, mlp_build, rounding
from qconv.calibration.schemes import Compensated
from qconv.calibration.statistics import InputStatistics
from qconv.errors import RecipeError
from qconv.folders.state import REPORT_NAME
from qconv.planning.recipe import Recipe
from qconv.verification.build import verify
from tests.conftest import FAMILIES, build, folder_bytes, random_model, save_model, small_recipe

Weights = dict[str, Tensor]


def recipe(method: str = "gptq", output_format: str = "gptq", **changes: Any) -> Recipe:
    """GPTQ on few tokens."""
    return small_recipe(method, output_format, **changes)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_every_family_verifies_and_no_linear_is_worse_than_rounding(
    model_type: str, method: str, tmp_path: Path
) -> None:
    model = save_model(random_model(model_type), tmp_path / "model")
    outcome = build(model, tmp_path / "out", recipe(method))
    assert not verify(tmp_path / "out", against=model).problems
    linears = [linear.name for layer in Build.open(tmp_path / "out").architecture.layers for linear in layer.linears()]
    records = {name: one for layer in outcome.report["layers"] for name, one in layer["compensations"].items()}
    assert sorted(records) == sorted(linears)
    assert all(record["error"] <= record["rtn_error"] for record in records.values())
    errors, rtn_errors = (sum(record[name] for record in records.values()) for name in ("error", "rtn_error"))
    # 128 tokens leave inputs of 64 and 96 features correlated: half the error is the least that is to be had.
    assert errors < 0.5 * rtn_errors
    mlps = [mlp for layer in outcome.report["layers"] for mlp in layer["experts"]]
    assert sum(mlp["loss"] for mlp in mlps) < 0.7 * sum(mlp["rtn_loss"] for mlp in mlps)
    assert "GPTQ's error" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("method", "ordering"), [("gptq", "desc_act"), ("awq+gptq", "static")])
def test_bytes_do_not_depend_on_threads(method: str, ordering: str, moe: Path, tmp_path: Path) -> None:
    chosen = recipe(method, gptq={"ordering": ordering})
    one = folder_bytes(build(moe, tmp_path / "1", chosen, threads=1).out)
    for threads in (2, 3):
        assert folder_bytes(build(moe, tmp_path / str(threads), chosen, threads=threads).out) == one


def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[str, ...], InputStatistics]]:
    """What is compensated together, and on which statistics; filled in as a build goes."""
    calls: list[tuple[tuple[str, ...], InputStatistics]] = []
    real = rounding.compensate

    def spy(made: Any, statistics: InputStatistics, weights: Weights, *more: Any) -> dict[str, Compensated]:
        calls.append((tuple(name.removeprefix("model.layers.") for name in weights), statistics))
        return real(made, statistics, weights, *more)

    for module in (attention, mlp_build):
        monkeypatch.setattr(module, "compensate", spy)
    return calls


def test_linears_of_one_input_share_a_hessian_and_experts_have_their_own(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = spied(monkeypatch)
    report = build(moe, tmp_path / "out", recipe(), threads=1).report
    groups = {names: statistics for names, statistics in calls}
    assert len(groups) == 2 * (2 + 6 * 2)
    qkv = groups[("0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj")]
    assert (qkv.hessian.shape, qkv.tokens) == ((64, 64), 128)
    assert groups[("0.self_attn.o_proj",)].hessian.shape == (96, 96)
    for expert, record in enumerate(report["layers"][0]["experts"]):
        prefix = f"0.mlp.experts.{expert}"
        pair, down = groups[(f"{prefix}.gate_proj", f"{prefix}.up_proj")], groups[(f"{prefix}.down_proj",)]
        assert (pair.hessian.shape, down.hessian.shape) == ((64, 64), (32, 32))
        # Its own tokens and the 16 that the layer lends it.
        assert pair.tokens == down.tokens == record["tokens"] + 16
    hessians = [statistics.hessian for names, statistics in calls if "gate_proj" in names[0]]
    assert not any(torch.equal(hessians[0], other) for other in hessians[1:])


def test_down_is_fitted_to_what_the_quantized_gate_and_up_pass_to_it(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gate and up left alone, down sees other inputs than with both at two bits."""
    calls = spied(monkeypatch)
    down = ("0.mlp.experts.0.down_proj",)
    build(moe, tmp_path / "coarse", recipe(grid={"bits": 2}), threads=1)
    coarse = dict(calls)[down].hessian
    calls.clear()
    build(moe, tmp_path / "fine", recipe(grid={"bits": 8}), threads=1)
    fine = dict(calls)[down].hessian
    assert float((coarse - fine).norm() / fine.norm()) > 0.05


def test_tokens_count_as_much_as_the_router_lets_them(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = spied(monkeypatch)
    found = {}
    for weights in ("uniform", "router"):
        calls.clear()
        changes = {"token_weights": weights, "shrinkage_tokens": 0}
        build(moe, tmp_path / weights, recipe(calibration=changes), threads=1)
        found[weights] = dict(calls)[("0.mlp.experts.0.gate_proj", "0.mlp.experts.0.up_proj")]
    uniform, router = found["uniform"], found["router"]
    assert uniform.tokens == router.tokens
    assert not torch.equal(uniform.hessian, router.hessian)
    # Weights are 1 on average, so the size stays what it was within the spread of the tokens.
    assert 0.5 < float(router.hessian.trace() / uniform.hessian.trace()) < 2.0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_other_bits_and_act_order_come_back_from_the_file(bits: int, symmetric: bool, tmp_path: Path) -> None:
    # 3 bits are packed by 32 values, so every side must be a multiple of that.
    model = save_model(random_model("qwen3_moe", head_dim=32), tmp_path / "model")
    chosen = recipe(grid={"bits": bits, "symmetric": symmetric}, gptq={"ordering": "desc_act"})
    build(model, tmp_path / "out", chosen)
    made = Build.open(tmp_path / "out")
    assert not verify(tmp_path / "out", against=model).problems
    gate = made.architecture.layers[0].mlps()[0].gate
    assert made.qtensor(gate).group_index is not None
    assert (made.grid_of(gate).bits, made.grid_of(gate).act_order) == (bits, True)


def test_a_format_without_room_for_an_order_refuses_it(moe: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"gptq\.ordering: format w4a16 has no place"):
        build(moe, tmp_path / "out", recipe(output_format="w4a16", gptq={"ordering": "desc_act"}))


@pytest.mark.parametrize("kept", ["*.experts.*", "*.self_attn.*", "*.down_proj"])
def test_what_the_recipe_skips_is_not_compensated(kept: str, moe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kept == "*.down_proj":
        with pytest.raises(RecipeError, match="engines load"):
            build(moe, out, recipe(skip=[kept]))
        return
    build(moe, out, recipe("awq+gptq", skip=[kept]))
    assert not verify(out, against=moe).problems
    layers = json.loads((out / REPORT_NAME).read_text())["layers"]
    part = kept.strip("*.")
    assert not any(f".{part}." in name for layer in layers for name in layer["compensations"])
