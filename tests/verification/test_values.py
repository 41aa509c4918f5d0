"""Numbers that no build can hold, whatever its source: found without one, and with one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconv.verification.build import verify
from tests.conftest import build, small_recipe

LAYER = "model.layers.1"
Change = Callable[[str, Tensor], Tensor]


@pytest.fixture(scope="module")
def static(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``moe`` in FP8 with stored scales of activations; do not write to it."""
    recipe = small_recipe("rtn", "fp8_static", grid={"bits": 8, "group_size": -1})
    return build(moe, tmp_path_factory.mktemp("values") / "build", recipe).out


def changed(folder: Path, out: Path, change: Change) -> Path:
    """A copy whose tensors are changed by name, without checksums, as somebody would leave it who meant the change."""
    shutil.copytree(folder, out)
    (out / "SHA256SUMS").unlink()
    for shard in out.glob("*.safetensors"):
        save_file({name: change(name, tensor) for name, tensor in load_file(shard).items()}, shard)
    return out


def scaled(ending: str, factor: float) -> Change:
    return lambda name, tensor: tensor * factor if name.endswith(ending) else tensor


def test_a_sound_build_is_sound(static: Path, moe: Path) -> None:
    assert verify(static).problems == []
    assert verify(static, moe).problems == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [f"{LAYER}.input_layernorm.weight", f"{LAYER}.mlp.gate.weight", "lm_head.weight"])
def test_what_is_not_quantized_must_be_finite(rtn_build: Path, tmp_path: Path, name: str, value: float) -> None:
    def change(key: str, tensor: Tensor) -> Tensor:
        damaged = tensor.clone()
        if key == name:
            damaged.view(-1)[5] = value
        return damaged

    (problem,) = verify(changed(rtn_build, tmp_path / "build", change)).problems
    assert f"tensor '{name}' holds 1 values that are not finite" in problem


@pytest.mark.parametrize("factor", [1000.0, 1e-4])
@pytest.mark.parametrize("ending", [".input_scale", "q_proj.input_scale", "experts.3.up_proj.input_scale"])
def test_a_scale_of_inputs_that_no_text_gives_is_found(
    static: Path, moe: Path, tmp_path: Path, ending: str, factor: float
) -> None:
    folder = changed(static, tmp_path / "build", scaled(ending, factor))
    for against in (None, moe):
        assert any("the scale of its inputs" in problem for problem in verify(folder, against).problems)


@pytest.mark.parametrize("part", ["self_attn.o_proj", "mlp.experts.2.down_proj"])
def test_what_weights_bound_is_bounded(static: Path, tmp_path: Path, part: str) -> None:
    # Far above any sum of products of these weights with inputs of that length.
    folder = changed(static, tmp_path / "build", scaled(f"{LAYER}.{part}.input_scale", 1e6))
    (problem,) = verify(folder).problems
    assert problem.startswith(f"{LAYER}.{part}: the scale of its inputs")


def test_others_may_scale_inputs_apart(static: Path, tmp_path: Path) -> None:
    folder = changed(static, tmp_path / "build", scaled("v_proj.input_scale", 0.9))
    assert any("has the same inputs" in problem for problem in verify(folder).problems)
    (folder / "qconv-report.json").unlink()
    assert verify(folder).problems == []


def test_scales_that_others_write_are_no_fault_of_theirs(rtn_build: Path, tmp_path: Path) -> None:
    name = f"{LAYER}.self_attn.q_proj.weight_scale"
    folder = changed(rtn_build, tmp_path / "build", lambda key, tensor: -tensor if key == name else tensor)
    assert verify(folder).problems == [f"{LAYER}.self_attn.q_proj: a scale is not positive"]
    (folder / "qconv-report.json").unlink()
    result = verify(folder)
    assert result.problems == []
    assert any("a scale is not positive" in notice for notice in result.notices)


def test_one_row_of_a_linear_is_found(rtn_build: Path, moe: Path, tmp_path: Path) -> None:
    name = f"{LAYER}.mlp.experts.2.up_proj.weight_packed"

    def exchange(key: str, tensor: Tensor) -> Tensor:
        if key != name:
            return tensor
        order = torch.arange(len(tensor))
        order[[3, 20]] = order[[20, 3]]
        return tensor[order].contiguous()

    folder = changed(rtn_build, tmp_path / "build", exchange)
    assert verify(folder).problems == []
    assert any(f"{LAYER}.mlp.experts.2.up_proj" in problem for problem in verify(folder, moe).problems)
