"""Language models that are a part of a larger one: names of the whole's checkpoint, towers copied, logits its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

import qconv
from evals.families import BOUND, IDS, METHODS, relative
from evals.model_types import SMALL, TYPES, WIDTHS, config_of
from qconv.artifacts.source import Source
from qconv.errors import CheckpointError
from qconv.formats.gguf.names import gguf_tensors
from qconv.models import architecture
from qconv.runtime.dense import write_dense
from qconv.runtime.stream import stream_logits
from qconv.verification.build import verify
from tests.conftest import BUNDLED, VOCABULARY, build, small_recipe

WHOLES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        "model.language_model.",
        "lm_head",
        {
            "hidden_size": 32,
            "depth": 1,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
        },
    ),
    "mistral3": (
        "mistral",
        "language_model.model.",
        "language_model.lm_head",
        {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "head_dim": 16},
    ),
    "kimi_k25": (
        "deepseek_v3",
        "language_model.model.",
        "language_model.lm_head",
        {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    ),
}
"""By type: that of its language model, what names begin with, the head, and a small tower."""


def whole(model_type: str, folder: Path) -> Any:
    """A random model of several parts, saved; it itself in float32."""
    text, _, _, vision = WHOLES[model_type]
    default = AutoConfig.for_model(text)
    small = SMALL | WIDTHS | {"vocab_size": VOCABULARY}
    small = {name: value for name, value in small.items() if hasattr(default, name)} | TYPES[text]
    kept = {name: value for name, value in small.items() if value is not None}
    described = AutoConfig.for_model(text, **kept).to_dict()
    sizes = {"vision_config": vision, "text_config": described, "tie_word_embeddings": False}
    torch.manual_seed(0)
    untyped: Any = AutoModelForImageTextToText
    model = untyped.from_config(AutoConfig.for_model(model_type, **sizes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(torch.bfloat16).save_pretrained(folder)
    # transformers saves Kimi's language model under names of its tower, and reads it under those that are published.
    file = folder / "model.safetensors"
    tensors = {
        name.replace("_model.model.blocks.", "_model.model.layers."): one for name, one in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BUNDLED / name, folder / name)
    return model.float().eval()


@pytest.mark.parametrize("model_type", WHOLES)
def test_names_are_those_of_the_whole(model_type: str, tmp_path: Path) -> None:
    whole(model_type, tmp_path / "model")
    source = Source.open(tmp_path / "model")
    _, inner, head, _ = WHOLES[model_type]
    found = source.architecture
    assert found.embedding.name == f"{inner}embed_tokens"
    assert found.head_name == head
    assert all(layer.name == f"{inner}layers.{layer.index}" for layer in found.layers)
    assert found.held_name(found.layers[0].input_norm.name) == "model.layers.0.input_layernorm"
    assert found.plain_name(f"{head}.weight") == "lm_head.weight"
    assert {name for name, _ in found.tensors()} <= source.checkpoint.entries.keys()
    assert source.verbatim
    assert {one.name for one in source.verbatim}.isdisjoint(name for name, _ in found.tensors())
    assert "vision tower" in {one.part for one in source.verbatim}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", WHOLES)
def test_a_build_computes_what_its_dequantized_weights_do(model_type: str, method: str, tmp_path: Path) -> None:
    model = whole(model_type, tmp_path / "model")
    made = build(tmp_path / "model", tmp_path / "build", small_recipe(method, METHODS[method])).out
    assert not verify(made, against=tmp_path / "model").problems
    write_dense(made, tmp_path / "dense", torch.float32)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
    model = _loaded(Source.open(tmp_path / "model"), tmp_path / "dense", tmp_path / "whole")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        assert relative(qconv.load(made, dtype="float32")(IDS).logits, expected) <= BOUND
    assert relative(torch.stack(list(stream_logits(made, list(IDS), dtype="float32"))), expected) <= BOUND
    assert float((before - expected).abs().max()) > 0.01


def _loaded(source: Source, dense: Path, folder: Path) -> Any:
    """The whole with its language model's dequantized weights, read by transformers itself."""
    tensors = {name: one for file in sorted(dense.glob("*.safetensors")) for name, one in load_file(file).items()}
    tensors |= {one.name: source.read(one.name).float() for one in source.verbatim}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    shutil.copyfile(source.checkpoint.path / "config.json", folder / "config.json")
    untyped: Any = AutoModelForImageTextToText
    return untyped.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("model_type", WHOLES)
def test_a_gguf_holds_the_language_model_under_its_own_names(model_type: str, tmp_path: Path) -> None:
    whole(model_type, tmp_path / "model")
    source = Source.open(tmp_path / "model")
    names = {tensor.name for tensor in gguf_tensors(source.architecture)}
    assert {"token_embd.weight", "output_norm.weight", "output.weight", "blk.0.attn_norm.weight"} <= names
    assert all(name.startswith(("token_embd", "output", "blk.")) for name in names)


def test_a_tensor_that_no_part_has_is_refused(tmp_path: Path) -> None:
    whole("mistral3", tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"vision_tower.unheard_of.weight": torch.ones(2, 2)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"vision_tower\.unheard_of\.weight"):
        Source.open(tmp_path)


def test_a_language_model_by_itself_has_no_prefix() -> None:
    assert architecture(config_of("mistral").to_dict()).prefixes == ()
