"""W4AFP8 in SGLang's and TensorRT-LLM's layout: nibbles by their definition, both kinds of linears, whole builds."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import qconv
from qconv.artifacts.build import Build
from qconv.artifacts.inspection import inspect
from qconv.artifacts.source import Source
from qconv.core.architecture import Moe
from qconv.core.qtensor import QTensor
from qconv.core.settings import GridSettings
from qconv.errors import CheckpointError, RecipeError
from qconv.formats import detect
from qconv.formats.w4afp8 import EXPERTS, FORMAT, OTHERS, sharing_inputs
from qconv.planning.plan import plan_of
from qconv.planning.recipe import Recipe, load_recipe
from qconv.runtime.files import open_files
from qconv.runtime.packed import IntegerWeight
from qconv.verification.build import verify
from tests.conftest import build, folder_bytes, random_model, random_qtensor, save_model

EXPERT, ATTENTION = "model.layers.0.mlp.experts.3.up_proj", "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random sparse model of whole blocks; do not write to it."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 128}
    return save_model(random_model("qwen3_moe", **sizes), tmp_path_factory.mktemp("w4afp8") / "model")


def recipe(**changes: Any) -> Recipe:
    few = {"calibration.tokens": 512, "calibration.sequence_length": 64}
    return load_recipe("w4afp8", few | changes)


def expert_weight(rows: int, groups: int, seed: int) -> QTensor:
    weight = random_qtensor(EXPERTS, rows, 128 * groups, seed)
    return QTensor(EXPERTS, weight.codes, weight.scales, None, input_scale=torch.tensor(0.25))


@given(rows=st.integers(1, 5), groups=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_a_reader_that_follows_the_definition_gets_our_weight(rows: int, groups: int, seed: int) -> None:
    weight = expert_weight(rows, groups, seed)
    tensors = dict(FORMAT.pack(EXPERT, weight))
    shape = (rows, 128 * groups)
    assert [(spec.name, spec.dtype, spec.shape) for spec in FORMAT.specs(EXPERT, *shape, EXPERTS)] == [
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    ]
    packed, scales = tensors[f"{EXPERT}.weight"], tensors[f"{EXPERT}.weight_scale_inv"]
    assert (packed.dtype, scales.dtype) == (torch.int8, torch.bfloat16)
    dense = weight.dequantize()
    for row in range(rows):
        for column in range(0, shape[1], 7):
            byte = int(packed[row, column // 2]) & 0xFF
            nibble = byte >> 4 if column % 2 else byte & 15
            signed = nibble - 16 if nibble >= 8 else nibble  # two's complement
            assert float(dense[row, column]) == signed * float(scales[row, column // 128])
    back = FORMAT.unpack(EXPERT, shape, tensors.__getitem__, EXPERTS)
    assert torch.equal(back.codes, weight.codes)
    assert float(back.input_scale or 0) == 0.25
    # SGLang holds scales in float32, and who writes them so is read, too.
    tensors[f"{EXPERT}.weight_scale_inv"] = scales.float()
    assert torch.equal(FORMAT.unpack(EXPERT, shape, tensors.__getitem__, EXPERTS).dequantize(), dense)


@pytest.mark.parametrize("leaf", ["weight", "weight_scale_inv", "input_scale"])
def test_a_misshapen_tensor_is_named(leaf: str) -> None:
    tensors = dict(FORMAT.pack(EXPERT, expert_weight(4, 2, 0)))
    tensors[f"{EXPERT}.{leaf}"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=rf"{EXPERT}\.{leaf}: "):
        FORMAT.unpack(EXPERT, (4, 256), tensors.__getitem__, EXPERTS)


def test_the_grids_and_the_words_of_config_json() -> None:
    assert FORMAT.grid(GridSettings(bits=8, group_size=128), torch.bfloat16) == OTHERS
    assert FORMAT.grid(GridSettings(bits=4, group_size=128), torch.float16, "int") == EXPERTS
    for settings, number in (
        (GridSettings(bits=4, group_size=64), "int"),
        (GridSettings(bits=8, group_size=128), "int"),
        (GridSettings(bits=4, group_size=128, symmetric=False), "int"),
        (GridSettings(bits=8, group_size=-1), None),
    ):
        with pytest.raises(RecipeError, match=r"^grid: the w4afp8 format has"):
            FORMAT.grid(settings, torch.bfloat16, number)  # type: ignore[arg-type]
    section = FORMAT.config({EXPERTS: [EXPERT], OTHERS: [ATTENTION]}, ["lm_head"])
    assert section["quant_method"] == "w4afp8"
    assert section["group_size"] == 128
    assert detect({"quantization_config": section}) is FORMAT
    described = FORMAT.read_config(section, torch.bfloat16)
    assert described.grids([EXPERT, ATTENTION]) == {EXPERT: EXPERTS, ATTENTION: OTHERS}
    assert described.skipped == ("lm_head",)
    # What SGLang's own releases say is less.
    assert FORMAT.read_config({"quant_method": "w4afp8"}, torch.bfloat16).skipped == ("lm_head",)
    with pytest.raises(CheckpointError, match="group_size is 64"):
        FORMAT.read_config({"quant_method": "w4afp8", "group_size": 64}, torch.bfloat16)


def test_experts_alone_are_int4_and_all_of_them(moe: Path) -> None:
    for rule in (
        {"match": "self_attn.*", "grid": "int4-g128"},
        {"match": "layers.0.mlp.experts.*", "grid": "int4-g128"},
    ):
        with pytest.raises(RecipeError, match="readers of w4afp8 take all experts for int4"):
            plan_of(Source.open(moe), recipe(rules=[rule]))


def test_whose_inputs_share_a_scale() -> None:
    names = list(islice(sharing_inputs(EXPERT), 4))
    assert names == [EXPERT.replace("3.up", f"{n}.{one}") for n in (0, 1) for one in ("gate", "up")]
    assert next(sharing_inputs("a.experts.5.down_proj")) == "a.experts.0.down_proj"


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_build_verifies_and_engines_rounding_is_emulated(method: str, moe: Path, tmp_path: Path) -> None:
    made = build(moe, tmp_path / "out", recipe(method=method)).out
    assert verify(made, moe).problems == []
    found = inspect(made)
    assert found.format == "w4afp8"
    assert found.weights == inspect(moe).weights
    files, opened = open_files(made), Build.open(made)
    layer = files.architecture.layers[1]
    assert isinstance(layer.mlp, Moe)
    largest = {
        half: max(opened.input_scale(one) for mlp in layer.mlp.experts for one in linears(mlp))
        for half, linears in (("inputs", lambda mlp: (mlp.gate, mlp.up)), ("inner", lambda mlp: (mlp.down,)))
    }
    mlp = layer.mlp.experts[2]
    for linear, half in ((mlp.gate, "inputs"), (mlp.up, "inputs"), (mlp.down, "inner")):
        rounding, weight = files.input_rounding(linear), files.weight(linear)
        assert rounding is not None
        assert rounding.scale is not None
        assert float(rounding.scale) == float(torch.tensor(largest[half]).bfloat16())
        assert isinstance(weight, IntegerWeight)
        assert torch.equal(weight.dequantize(torch.float32), opened.qtensor(linear).dequantize())
    attention = files.input_rounding(layer.heads.q)
    assert attention is not None
    assert (attention.group, attention.scale) == (128, None)
    ids = torch.randint(3, 200, (1, 24), generator=torch.Generator().manual_seed(2))
    exact, rounded = (qconv.load(made, dtype="float32", round_inputs=one)(ids).logits for one in (False, True))
    size = float(exact.abs().max())
    assert 1e-4 * size < float((rounded - exact).abs().max()) < 0.5 * size


def test_stopped_in_the_middle_it_ends_with_the_same_bytes(moe: Path, tmp_path: Path) -> None:
    whole = folder_bytes(build(moe, tmp_path / "whole", recipe()).out)

    def stop(key: str, done: int, total: int) -> None:
        if key == "layer-00001":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(moe, tmp_path / "out", recipe(), progress=stop)
    build(moe, tmp_path / "out", recipe())
    assert folder_bytes(tmp_path / "out") == whole
    tensors = {name for shard in (tmp_path / "out").glob("*.safetensors") for name in load_file(shard)}
    assert f"{EXPERT}.input_scale" in tensors
    section = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert "model.layers.0.mlp.gate" in section["modules_to_not_convert"]
