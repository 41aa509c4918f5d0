"""GGUF models as transformers models: names, rotary layout, experts, config and tokenizer from the file alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

import qconv
from qconv.building.gguf_pipeline import quantize_gguf
from qconv.core.settings import OutputSettings
from qconv.errors import CheckpointError
from qconv.formats.gguf.names import permute_heads
from qconv.planning.gguf_recipe import GgufRecipe
from qconv.runtime.dense import write_dense
from qconv.runtime.gguf_files import GgufFiles, original_heads
from qconv.runtime.loading import memory
from qconv.runtime.tokenizer import load_tokenizer, own_tokenizer
from tests.conftest import BUNDLED, random_model, save_model

IDS = torch.arange(40).view(2, 20)
TEXT = "def f(x):\n    return x  + 12345  # é\n<|im_start|>hi<|im_end|>"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen2_moe": ("qwen2_moe", {"head_dim": 16, "norm_topk_prob": False}),
    "mixtral": ("mixtral", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "llama": ("llama", {}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "yarn": (
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
}


def convert(model: Path, out: Path, file_type: str, **options: Any) -> Path:
    """Write GGUF quietly."""
    values: dict[str, Any] = {"threads": 2, "progress": lambda *_: None, "log": lambda _: None}
    recipe = GgufRecipe(type=file_type, output=OutputSettings.model_construct(**options))
    return Path(quantize_gguf(model, out, recipe, **values).out)


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    """[sequences, length, vocabulary]."""
    with torch.no_grad():
        output: Tensor = model(ids).logits
    return output


@pytest.mark.parametrize("kind", MODELS)
def test_a_file_alone_is_the_model_that_it_was_made_from(kind: str, tmp_path: Path) -> None:
    family, changes = MODELS[kind]
    source = random_model(family, **changes)
    out = convert(save_model(source, tmp_path / "model"), tmp_path / "out", "BF16")
    model = qconv.load(out, dtype=torch.float32)
    assert type(model) is type(source)
    wanted = logits(source)  # its weights are bf16 numbers, so nothing is lost
    assert float((logits(model) - wanted).abs().max()) < 2e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("file_type", ["Q5_1", "Q4_K_M", "MXFP4_MOE"])
def test_blocks_of_every_kind_stand_for_what_the_gguf_package_says(file_type: str, tmp_path: Path) -> None:
    out = convert(BUNDLED, tmp_path / "out", file_type)
    files = GgufFiles.open(out)
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(files.path).tensors}
    layer = files.architecture.layers[1]
    experts = layer.mlps()
    for linear, name, part in (
        (layer.heads.q, "blk.1.attn_q.weight", None),
        (experts[3].down, "blk.1.ffn_down_exps.weight", 3),
        (experts[15].gate, "blk.1.ffn_gate_exps.weight", 15),
    ):
        wanted = torch.from_numpy(np.array(gguf.quants.dequantize(read[name].data, read[name].tensor_type)))
        got = files.weight(linear).dequantize(torch.float32)
        assert torch.equal(got, wanted if part is None else wanted[part])


def test_packed_and_dequantized_model_agree_and_memory_is_the_files(tmp_path: Path) -> None:
    out = convert(BUNDLED, tmp_path / "out", "Q4_K_M")
    write_dense(out, tmp_path / "dense", torch.float32)
    packed, dense = qconv.load(out, dtype=torch.float32), qconv.load(tmp_path / "dense")
    wanted = logits(dense)
    assert float((logits(packed) - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(packed.generate(IDS[:1], **options), dense.generate(IDS[:1], **options))
    file = next(out.glob("*.gguf"))
    assert memory(qconv.load(file, dtype=torch.bfloat16)) < file.stat().st_size
    assert memory(dense) == pytest.approx(4 * 14_961_408, rel=0.01)  # float32


def test_a_set_of_splits_is_one_model(tmp_path: Path) -> None:
    source = random_model("qwen3_moe", norm_topk_prob=True)
    out = convert(save_model(source, tmp_path / "model"), tmp_path / "out", "BF16", max_shard_size=200_000)
    files = sorted(out.glob("*.gguf"))
    assert len(files) > 2
    wanted = logits(source)
    assert float((logits(qconv.load(files[1], dtype="float32")) - wanted).abs().max()) < 2e-5 * float(
        wanted.abs().max()
    )
    files[-1].unlink()
    with pytest.raises(CheckpointError, match=files[-1].name):
        qconv.load(out)


def test_the_tokenizer_is_the_files_own(tmp_path: Path) -> None:
    out = convert(BUNDLED, tmp_path / "out", "Q8_0")
    ours, original = load_tokenizer(next(out.glob("*.gguf"))), load_tokenizer(BUNDLED)
    assert ours(TEXT).input_ids == original(TEXT).input_ids
    assert own_tokenizer(out) == "tokenizer.ggml.model gpt2, tokenizer.ggml.pre qwen2"
    assert own_tokenizer(BUNDLED) is None
    chat = [{"role": "user", "content": "hi"}]
    options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False}
    assert ours.apply_chat_template(chat, **options) == original.apply_chat_template(chat, **options)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(tmp_path)


def test_every_chat_template_of_a_file_is_kept(tmp_path: Path) -> None:
    source = Path(shutil.copytree(BUNDLED, tmp_path / "source"))
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    out = convert(source, tmp_path / "out", "Q8_0")
    ours = load_tokenizer(next(out.glob("*.gguf")))
    assert ours.chat_template == load_tokenizer(source).chat_template
    assert ours.chat_template["tool_use"] == "tools"


def test_rows_come_back_to_transformers_order() -> None:
    rows = torch.arange(24).view(24, 1)
    assert torch.equal(original_heads(permute_heads(rows, 3), 3), rows)
    assert not torch.equal(permute_heads(rows, 3), rows)


def test_damage_is_said_by_file_and_tensor(tmp_path: Path) -> None:
    out = convert(save_model(random_model("llama"), tmp_path / "model"), tmp_path / "out", "Q8_0")
    file = next(out.glob("*.gguf"))
    content = file.read_bytes()
    # Keys are read before their values, so each can be renamed in place.
    for old, new, error in (
        (b"llama.block_count", b"llama.block_covnt", "llama.block_count is None"),
        (b"general.architecture", b"general.architectvre", "names no architecture"),
        (b"blk.1.attn_q.weight", b"blk.7.attn_q.weight", "blk.1.attn_q.weight"),
        (
            b"llama.attention.head_count_kv",
            b"llama.attention.head_count_kw",
            "head_count_kw is 2, with which qconv does not compute",
        ),
    ):
        damaged = tmp_path / "damaged.gguf"
        damaged.write_bytes(content.replace(old, new))
        with pytest.raises(CheckpointError, match=error):
            qconv.load(damaged)
    shutil.copyfile(file, damaged)
    damaged.write_bytes(content[:-4000])
    with pytest.raises(CheckpointError, match="damaged"):
        qconv.load(damaged)


def test_the_model_opened_again_has_the_same_config(tmp_path: Path) -> None:
    source = save_model(random_model("qwen2_moe", head_dim=16, norm_topk_prob=False), tmp_path / "model")
    config = GgufFiles.open(convert(source, tmp_path / "out", "Q4_0")).config
    assert config["shared_expert_intermediate_size"] == 64
    assert config["norm_topk_prob"] is False
    assert config["eos_token_id"] == [0, 2]  # <|endoftext|>, which the file names, and <|im_end|>, by its text
