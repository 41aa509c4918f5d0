"""Source checkpoints that are not what they claim, each refused with its own words before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconv.artifacts.source import Source
from qconv.checkpoint import reader
from qconv.checkpoint.reader import INDEX_NAME
from qconv.errors import CheckpointError
from tests.conftest import random_model, save_model

NORM = "model.layers.1.post_attention_layernorm.weight"
Edit = Callable[..., None]


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Change a checkpoint's tensors and write it as one file."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (folder / INDEX_NAME).unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def refused(folder: Path, *parts: str) -> None:
    """Opening the folder fails with a message that holds all parts, and a remedy."""
    with pytest.raises(CheckpointError) as caught:
        Source.open(folder)
    for part in parts:
        assert part in caught.value.message, caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 5


def test_a_sound_checkpoint_opens(moe: Path) -> None:
    source = Source.open(moe)
    assert source.dtype == torch.bfloat16
    assert source.architecture.family == "qwen3_moe"
    names = [file.name for file in source.companions()]
    assert names == ["chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


def test_missing_shard(moe_copy: Path) -> None:
    shard = sorted(moe_copy.glob("*.safetensors"))[1]
    shard.unlink()
    refused(moe_copy, "1 of ", "shards missing", shard.name)


def test_truncated_shard(moe_copy: Path) -> None:
    shard = sorted(moe_copy.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(moe_copy, shard.name, "truncated")


def test_a_header_that_lies(moe_copy: Path) -> None:
    shard = sorted(moe_copy.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    assert content.count(b'"BF16"') > 1
    shard.write_bytes(content.replace(b'"BF16"', b'"F32" ', 1))  # of the same length
    refused(moe_copy, shard.name, "the header lies")


def test_a_missing_tensor(moe_copy: Path) -> None:
    edit_tensors(moe_copy, lambda tensors: tensors.__delitem__(NORM))
    refused(moe_copy, "1 tensors of a qwen3_moe model are missing", repr(NORM))


def test_an_unknown_tensor(moe_copy: Path) -> None:
    edit_tensors(moe_copy, lambda tensors: tensors.update({"model.layers.0.extra.weight": torch.ones(1)}))
    refused(moe_copy, "1 tensors are not part of a qwen3_moe model", "'model.layers.0.extra.weight'")


def test_a_wrong_shape(moe_copy: Path) -> None:
    edit_tensors(moe_copy, lambda tensors: tensors.update({NORM: torch.ones(63).bfloat16()}))
    refused(moe_copy, repr(NORM), "[63]", "config.json implies [64]")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn, torch.int32])
def test_a_wrong_dtype(moe_copy: Path, dtype: torch.dtype) -> None:
    edit_tensors(moe_copy, lambda tensors: tensors.update({NORM: tensors[NORM].float().to(dtype)}))
    refused(moe_copy, repr(NORM), "has dtype", "a weight must be one of BF16, F16, F32")


def test_unknown_architecture(moe_copy: Path, edit_json: Edit) -> None:
    edit_json(moe_copy / "config.json", model_type="mamba")
    refused(moe_copy, "config.json", "unknown architecture: model_type 'mamba'")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model_type": None}, "no model_type"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"mlp_only_layers": 3}, "mlp_only_layers is 3"),
        ({"num_experts_per_tok": 99}, "num_experts_per_tok 99 exceeds the 6 experts"),
        ({"num_hidden_layers": 3}, "tensors of a qwen3_moe model are missing"),
        ({"num_hidden_layers": 1}, "not part of a qwen3_moe model"),
        ({"quantization_config": {"quant_method": "awq"}}, "already quantized (quant_method 'awq')"),
        ({"quantization_config": 3}, "already quantized"),
    ],
    ids=lambda value: str(value),
)
def test_a_config_that_does_not_fit(moe_copy: Path, edit_json: Edit, changes: dict[str, Any], part: str) -> None:
    edit_json(moe_copy / "config.json", **changes)
    refused(moe_copy, part)


def test_a_missing_config(moe_copy: Path) -> None:
    (moe_copy / "config.json").unlink()
    refused(moe_copy, "config.json: no such file")


def test_a_missing_tokenizer(moe_copy: Path) -> None:
    (moe_copy / "tokenizer.json").unlink()
    refused(moe_copy, str(moe_copy), "no tokenizer", "tokenizer.json")


def test_a_tied_heads_copy_is_ignored(tmp_path: Path) -> None:
    folder = save_model(random_model("llama", tie_word_embeddings=True), tmp_path / "model")
    assert "lm_head.weight" not in Source.open(folder).checkpoint.entries

    def add_copy(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    assert Source.open(edit_tensors(folder, add_copy)).architecture.lm_head is None


def test_a_nan_is_found_when_it_is_read_and_not_before(moe_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.embed_tokens.weight"

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[name][1500, 17] = float("nan")

    source = Source.open(edit_tensors(moe_copy, damage))
    with pytest.raises(CheckpointError, match=r"'model\.embed_tokens\.weight' holds 1 values .* at \[1500, 17\]"):
        source.read(name)
    # Block by block the position still counts from the tensor's own start.
    monkeypatch.setattr(reader, "BLOCK_BYTES", 64 * 2 * 100)
    blocks = source.blocks(name)
    assert [len(next(blocks)) for _ in range(15)] == [100] * 15
    with pytest.raises(CheckpointError, match=r"at \[1500, 17\]") as caught:
        next(blocks)
    assert "model.safetensors" in caught.value.message


def test_older_configs_mean_the_same(moe_copy: Path, edit_json: Edit) -> None:
    config = json.loads((moe_copy / "config.json").read_text())
    assert "num_experts" in config or "num_local_experts" in config
    count = config.get("num_local_experts") or config.get("num_experts")
    edit_json(moe_copy / "config.json", num_local_experts=None, num_experts=count)
    older = Source.open(moe_copy).architecture
    edit_json(moe_copy / "config.json", num_local_experts=count, num_experts=None)
    assert Source.open(moe_copy).architecture == older
