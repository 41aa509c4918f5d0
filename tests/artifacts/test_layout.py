"""One answer to how weights are stored: what inspect calls read, generate runs and verify checks; the rest is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconv.artifacts.inspection import inspect
from qconv.artifacts.layout import AWQ_CONFIG, GPTQ_CONFIG, layout_of
from qconv.errors import CheckpointError, UnreadLayoutError
from qconv.formats.packed import unpack_rows
from qconv.runtime.files import open_files
from qconv.verification.build import verify
from tests.conftest import build, small_recipe

FP6_GROUPS = {"group_0": {"weights": {"num_bits": 6, "type": "float", "strategy": "group", "group_size": 32}}}
UNREAD: dict[str, tuple[dict[str, Any], str]] = {
    "mxfp6": (
        {
            "quant_method": "compressed-tensors",
            "format": "mxfp6-pack-quantized",
            "config_groups": FP6_GROUPS,
        },
        "'mxfp6-pack-quantized'",
    ),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "MIXED_PRECISION"),
    "modelopt's fp8": ({"quant_method": "modelopt", "quant_algo": "FP8"}, "'FP8'"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method 'bitsandbytes'"),
    "awq for gemv": ({"quant_method": "awq", "version": "gemv", "bits": 4, "group_size": 32}, "'gemv'"),
    "gptq by marlin": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "is_marlin_format": True},
        "is_marlin_format",
    ),
    "nothing said": ({}, "it does not say which"),
}


@pytest.fixture
def foreign(rtn_build: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a build as another tool would leave it: no report, no checksums, another ``quantization_config``."""

    def make(section: dict[str, Any] | None, **config: Any) -> Path:
        out = Path(shutil.copytree(rtn_build, tmp_path / "foreign"))
        for name in ("SHA256SUMS", "qconv-report.json"):
            (out / name).unlink()
        values = json.loads((out / "config.json").read_text()) | {"quantization_config": section} | config
        (out / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
        return out

    return make


@pytest.mark.parametrize("name", UNREAD)
def test_a_layout_that_is_not_read_is_named_and_not_called_damaged(foreign: Callable[..., Path], name: str) -> None:
    section, said = UNREAD[name]
    out = foreign(section)
    with pytest.raises(UnreadLayoutError) as caught:
        open_files(out)
    assert said in caught.value.message
    assert str(out / "config.json") in caught.value.message
    assert caught.value.exit_code == 2
    result = verify(out)
    assert (result.problems, result.not_checked) == ([], [caught.value.message])
    assert inspect(out).format is None


def test_mlxs_words_are_known_as_such(foreign: Callable[..., Path]) -> None:
    said = {"group_size": 64, "bits": 4}
    for section in (None, said):
        out = foreign(section, quantization=said)
        assert inspect(out).format == "mlx"
        assert verify(out).problems == [f"{out / 'config.json'}: quantization: no linear of a layer has codes."]
        shutil.rmtree(out)


def test_an_architecture_that_is_not_known_is_not_called_damaged(foreign: Callable[..., Path], rtn_build: Path) -> None:
    section = json.loads((rtn_build / "config.json").read_text())["quantization_config"]
    result = verify(foreign(section, model_type="deepseek_v3"))
    assert result.problems == []
    assert "'deepseek_v3'" in result.not_checked[0]


def test_a_broken_shard_of_an_unread_layout_is_still_a_problem(foreign: Callable[..., Path]) -> None:
    out = foreign(UNREAD["mxfp6"][0])
    shard = next(out.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert verify(out).problems


@pytest.fixture(scope="module")
def eight_bits(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``moe`` in eight bits, a scale a row: what W8A8's weights are."""
    recipe = small_recipe(grid={"bits": 8, "group_size": -1})
    return build(moe, tmp_path_factory.mktemp("layout") / "build", recipe).out


def whole_numbers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Words of four codes, each with 128 added, as int8."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(".weight_packed"):
            codes = unpack_rows(tensor, 8).to(torch.int16) - 128
            found[name.replace("weight_packed", "weight")] = codes.to(torch.int8)
        elif not name.endswith(".weight_shape"):
            found[name] = tensor
    return found


def test_int8_weights_are_inspected_verified_and_run_alike(eight_bits: Path, moe: Path, tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for shard in eight_bits.glob("*.safetensors"):
        tensors |= load_file(shard)
    tensors = whole_numbers(tensors)
    config = json.loads((eight_bits / "config.json").read_text())
    section = config["quantization_config"]
    section["format"] = section["config_groups"]["group_0"]["format"] = "int-quantized"
    tokens = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
    section["config_groups"]["group_0"]["input_activations"] = tokens
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(moe / name, tmp_path / name)
    save_file(tensors, tmp_path / "model.safetensors")
    assert inspect(tmp_path).format == layout_of(tmp_path, config).name == "w8a8"
    assert verify(tmp_path).problems == []
    against = verify(tmp_path, moe)
    assert (against.problems, against.not_checked) == ([], [])
    assert min(against.snr_db.values()) > 35  # eight bits
    linear = open_files(tmp_path).architecture.layers[1].heads.k
    ours, theirs = (open_files(path).weight(linear).dequantize(torch.float32) for path in (tmp_path, eight_bits))
    assert torch.equal(ours, theirs)
    name = "model.layers.1.self_attn.k_proj"
    tensors[f"{name}.weight_scale"][3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    assert verify(tmp_path).problems == [f"{name}: a scale is not finite"]


@pytest.mark.parametrize("place", ["compression_config", AWQ_CONFIG, GPTQ_CONFIG])
def test_where_else_a_section_may_stand(tmp_path: Path, place: str) -> None:
    words = {"compression_config": {"quant_method": "awq", "bits": 4, "group_size": 32}}
    values: dict[str, Any] = {}
    if place == "compression_config":
        values = words
    else:
        (tmp_path / place).write_text(json.dumps({"w_bit": 4, "bits": 4, "q_group_size": 32, "group_size": 32}))
    found = layout_of(tmp_path, values)
    assert found.name == ("gptq" if place == GPTQ_CONFIG else "awq")


@pytest.mark.parametrize("section", ["awq", [], 3])
def test_a_section_that_is_no_object_is_damage(tmp_path: Path, section: Any) -> None:
    with pytest.raises(CheckpointError, match="no object") as caught:
        layout_of(tmp_path, {"quantization_config": section})
    assert caught.value.exit_code == 5


def test_how_others_list_what_they_skip_is_no_damage(foreign: Callable[..., Path], rtn_build: Path) -> None:
    section = json.loads((rtn_build / "config.json").read_text())["quantization_config"]
    section["ignore"] = ["lm_head"]
    result = verify(foreign(section))
    assert result.problems == []
    assert any("skip list" in notice for notice in result.notices)


def test_targets_say_what_is_quantized(foreign: Callable[..., Path], rtn_build: Path) -> None:
    section = json.loads((rtn_build / "config.json").read_text())["quantization_config"]
    section["ignore"] = []
    section["config_groups"]["group_0"]["targets"] = [r"re:.*self_attn\.[qkvo]_proj$", r"re:.*experts\.\d+\..*_proj$"]
    result = verify(foreign(section))
    assert result.problems == []
    assert not any("skip list" in notice for notice in result.notices)


def test_more_regular_expressions_than_any_tool_writes_are_refused(tmp_path: Path) -> None:
    """Every module is held against each: 100,000 took minutes."""
    group = {"targets": [f"re:.*{number}$" for number in range(600)]}
    section = {"quant_method": "compressed-tensors", "config_groups": {"a": group}, "ignore": group["targets"]}
    with pytest.raises(CheckpointError, match="1,200 regular expressions"):
        layout_of(tmp_path, {"quantization_config": section})
