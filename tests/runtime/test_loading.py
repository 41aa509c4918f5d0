"""Builds as working models, against transformers on the dequantized weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qconv
from qconv.checkpoint.reader import Checkpoint
from qconv.errors import CheckpointError, UsageError
from qconv.runtime.dense import write_dense
from qconv.runtime.loading import memory
from tests.conftest import FAMILIES, build, random_model, save_model, small_recipe

IDS = torch.arange(40).view(2, 20)


def transformers_model(folder: Path) -> Any:
    """transformers' own loading in float32."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    """[sequences, length, vocabulary]."""
    with torch.no_grad():
        output: Tensor = model(ids).logits
    return output


def assert_same_model(model: Any, other: Any) -> None:
    """The same logits but for the order of sums in float32, the same tokens."""
    wanted = logits(other)
    assert float((logits(model) - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS[:1, :7], **options), other.generate(IDS[:1, :7], **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_build_of_every_family(family: str, tmp_path: Path) -> None:
    source = save_model(random_model(family), tmp_path / "model")
    out = build(source, tmp_path / "build", small_recipe()).out
    write_dense(out, tmp_path / "dense", torch.float32)
    assert_same_model(qconv.load(out, dtype="float32"), transformers_model(tmp_path / "dense"))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unquantized_checkpoint_of_every_family(family: str, tmp_path: Path) -> None:
    model = random_model(family, tie_word_embeddings=family == "qwen3")
    source = save_model(model, tmp_path / "model")
    assert_same_model(qconv.load(source, dtype=torch.float32), model)


def test_a_missing_tensor_is_named(rtn_build: Path, tmp_path: Path, edit_json: Callable[..., None]) -> None:
    damaged = Path(shutil.copytree(rtn_build, tmp_path / "build"))
    edit_json(damaged / "config.json", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.2\.input_layernorm\.weight' is missing"):
        qconv.load(damaged)


def test_a_truncated_shard_is_named(rtn_build: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(rtn_build, tmp_path / "build"))
    shard = Checkpoint.open(damaged).files[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=shard.name):
        qconv.load(damaged)


def test_what_cannot_be_run_is_said(rtn_build: Path, tmp_path: Path, edit_json: Callable[..., None]) -> None:
    damaged = Path(shutil.copytree(rtn_build, tmp_path / "build"))
    edit_json(damaged / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(CheckpointError, match="bitsandbytes"):
        qconv.load(damaged)
    with pytest.raises(CheckpointError, match="no such folder"):
        qconv.load(tmp_path / "nothing")
    with pytest.raises(UsageError, match="int8"):
        qconv.load(rtn_build, dtype="int8")


def test_packed_weights_are_all_that_is_in_memory(rtn_build: Path) -> None:
    model = qconv.load(rtn_build, dtype=torch.bfloat16)
    stored = sum(entry.nbytes for entry in Checkpoint.open(rtn_build).entries.values())
    rotary = sum(buffer.nbytes for buffer in model.buffers())
    # A mapping begins at a page of the file, so that it is up to a page larger than its tensor.
    assert stored <= memory(model) - rotary < stored + 4096 * len(Checkpoint.open(rtn_build).entries)
