"""Experts in one tensor a layer, as transformers 5 saves them on request: read as the same model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qconv
from qconv.artifacts.source import Source
from qconv.checkpoint.reader import SINGLE_NAME
from qconv.errors import CheckpointError, UsageError
from qconv.planning.estimate import estimate
from qconv.planning.gguf_outline import outline
from qconv.planning.gguf_recipe import GgufRecipe
from qconv.runtime.files import open_files
from tests.conftest import build, random_model, save_model, small_recipe

Edit = Callable[..., None]
FAMILIES = ["qwen3_moe", "qwen2_moe", "mixtral", "minimax_m2"]


def both(folder: Path, model_type: str) -> tuple[Path, Path]:
    """A random model as its family saves it, and with joined experts under transformers' names."""
    if model_type == "minimax_m2":
        from evals.model_types import config_of, model_of

        model = model_of(type(config_of(model_type))(**config_of(model_type).to_dict() | WIDTHS))
    else:
        model = random_model(model_type)
    apart = save_model(model, folder / "apart")
    joined = save_model(model, folder / "joined")
    for file in joined.glob("*.safetensors*"):
        file.unlink()
    model.to(torch.bfloat16).save_pretrained(joined, save_original_format=False)
    return apart, joined


WIDTHS = {"vocab_size": 2048, "intermediate_size": 32}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_same_tensors_and_the_same_build(tmp_path: Path, model_type: str) -> None:
    apart, joined = both(tmp_path, model_type)
    assert any(name.endswith(".experts.gate_up_proj") for name in load_file(joined / SINGLE_NAME))
    expected, found = Source.open(apart), Source.open(joined)
    assert found.architecture == expected.architecture
    assert found.checkpoint.entries.keys() == expected.checkpoint.entries.keys()
    for name in expected.checkpoint.entries:
        assert torch.equal(found.read(name), expected.read(name)), name
    builds = [build(folder, tmp_path / f"{folder.name}-build", small_recipe("gptq")).out for folder in (apart, joined)]
    shards = [sorted(path.glob("*.safetensors")) for path in builds]
    assert [file.read_bytes() for file in shards[0]] == [file.read_bytes() for file in shards[1]]


def test_the_runtime_computes_the_same(tmp_path: Path) -> None:
    ids = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        one, other = (qconv.load(folder, dtype="float32")(ids).logits for folder in both(tmp_path, "mixtral"))
    assert torch.equal(one, other)


def test_plans_need_no_shard(tmp_path: Path, edit_json: Edit) -> None:
    _, joined = both(tmp_path, "mixtral")
    tensors = load_file(joined / SINGLE_NAME)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (joined / "model.safetensors.index.json").write_text(json.dumps(index))
    (joined / SINGLE_NAME).unlink()
    assert estimate(joined, small_recipe()).output_bytes > 0
    assert outline(joined, GgufRecipe(type="Q8_0")).tensors


def test_another_orientation_is_named(tmp_path: Path) -> None:
    _, joined = both(tmp_path, "qwen3_moe")
    tensors = load_file(joined / SINGLE_NAME)
    name = "model.layers.1.mlp.experts.down_proj"
    save_file(tensors | {name: tensors[name].transpose(1, 2).contiguous()}, joined / SINGLE_NAME, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"tensor '{name}' is \[6, 32, 64\], config.json implies \[6, 64, 32\]"):
        Source.open(joined)


def test_a_missing_half_is_named(tmp_path: Path) -> None:
    _, joined = both(tmp_path, "qwen3_moe")
    tensors = load_file(joined / SINGLE_NAME)
    del tensors["model.layers.0.mlp.experts.gate_up_proj"]
    save_file(tensors, joined / SINGLE_NAME, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"12 tensors .* missing, the first .*experts\.0\.gate_proj"):
        Source.open(joined)


def test_quantized_and_joined_is_refused(tmp_path: Path, edit_json: Edit) -> None:
    _, joined = both(tmp_path, "mixtral")
    edit_json(joined / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    plans: tuple[Any, ...] = (
        lambda path: estimate(path, small_recipe()),
        lambda path: outline(path, GgufRecipe(type="Q8_0")),
    )
    for refuse in (Source.open, open_files, *plans):
        with pytest.raises(UsageError, match=r"holds all experts of a layer.* quantized") as caught:
            refuse(joined)
        assert caught.value.exit_code == 2
