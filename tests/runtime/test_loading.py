"""Builds as working models, against transformers on the dequantized weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qconv
from qconv.artifacts.source import Source
from qconv.calibration.forward import Decoder
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
    assert qconv.load(rtn_build).dtype == torch.bfloat16  # config.json's


def test_packed_weights_are_all_that_is_in_memory(rtn_build: Path) -> None:
    model = qconv.load(rtn_build, dtype=torch.bfloat16)
    stored = sum(entry.nbytes for entry in Checkpoint.open(rtn_build).entries.values())
    rotary = sum(buffer.nbytes for buffer in model.buffers())
    # All but each linear's shape, which nobody needs any more.
    shapes = sum(entry.nbytes for name, entry in Checkpoint.open(rtn_build).entries.items() if "weight_shape" in name)
    assert memory(model) - rotary in (stored - shapes, stored)


@pytest.mark.parametrize(
    ("output_format", "grid", "old_config"),
    [
        ("awq", {}, ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"})),
        ("gptq", {}, ("quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False, "sym": True})),
        ("w4a16", {"bits": 8, "symmetric": False}, None),
    ],
)
def test_builds_as_older_tools_describe_them(
    output_format: str,
    grid: dict[str, Any],
    old_config: tuple[str, dict[str, Any]] | None,
    moe: Path,
    tmp_path: Path,
    edit_json: Callable[..., None],
) -> None:
    out = build(moe, tmp_path / "build", small_recipe("rtn", output_format, grid=grid)).out
    wanted = logits(qconv.load(out, dtype="float32"))
    write_dense(out, tmp_path / "dense", torch.float32)
    reference = logits(transformers_model(tmp_path / "dense"))
    assert float((wanted - reference).abs().max()) < 1e-5 * float(reference.abs().max())
    if old_config is not None:
        name, values = old_config
        edit_json(out / "config.json", quantization_config=None)
        (out / name).write_text(json.dumps(values))
        assert torch.equal(logits(qconv.load(out, dtype="float32")), wanted)


def test_a_misshapen_tensor_is_named(rtn_build: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(rtn_build, tmp_path / "build"))
    name = "model.layers.1.self_attn.o_proj.weight_packed"
    shard = Checkpoint.open(damaged).entry(name).file
    content = shard.read_bytes()
    rows = Checkpoint.open(damaged).entry(name).shape
    old = f'"shape":[{rows[0]},{rows[1]}]'.encode()
    at = content.index(old, content.index(name.encode()))
    new = f'"shape":[{rows[1]},{rows[0]}]'.encode()
    assert len(new) == len(old)
    shard.write_bytes(content[:at] + new + content[at + len(old) :])
    with pytest.raises(CheckpointError, match=r"o_proj\.weight_packed"):
        qconv.load(damaged)


@pytest.mark.parametrize(
    "damage",
    [{"initializer_range": False}, {"hidden_act": "abacus"}, {"hidden_act": 5}],
)
def test_a_config_that_transformers_refuses_is_named(moe: Path, tmp_path: Path, damage: dict[str, Any]) -> None:
    copied = Path(shutil.copytree(moe, tmp_path / "copy"))
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | damage))
    described = Source.open(moe).architecture
    for use in (qconv.load, lambda folder: Decoder(folder, described)):
        with pytest.raises(CheckpointError, match="transformers does not accept"):
            use(copied)


def test_the_generation_config_is_the_builds(rtn_build: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(rtn_build, tmp_path / "build"))
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7], "top_k": 3}))
    stated = qconv.load(copied).generation_config
    assert (stated.eos_token_id, stated.top_k) == ([5, 7], 3)
