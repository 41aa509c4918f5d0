"""What a GGUF file says of the computation is computed, or refused by name; nothing that it says is left out."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFValueType
from torch import Tensor

import qconv
from qconv.building.gguf_pipeline import quantize_gguf
from qconv.errors import CheckpointError
from qconv.planning.gguf_recipe import GgufRecipe
from qconv.runtime.gguf_files import GgufFiles
from tests.conftest import random_model, save_model
from tests.gguf_copies import Key, copied

IDS = torch.arange(40).view(1, 40)
FLOAT, COUNT, TRUTH, TEXT = GGUFValueType.FLOAT32, GGUFValueType.UINT32, GGUFValueType.BOOL, GGUFValueType.STRING
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
ZEROS = ("attn_q.bias", "attn_k.bias", "attn_output.bias")

Make = Callable[..., tuple[Any, Path]]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A random model and its file in BF16: ``make("llama", attention_bias=True)``; made once each."""
    made: dict[str, tuple[Any, Path]] = {}

    def of(family: str, prepare: Callable[[Any], None] = lambda model: None, **changes: Any) -> tuple[Any, Path]:
        key = f"{family} {changes}"
        if key not in made:
            folder = tmp_path_factory.mktemp("keys")
            model = random_model(family, **changes)
            prepare(model)
            save_model(model, folder / "model")
            options: dict[str, Any] = {"threads": 1, "progress": lambda *_: None, "log": lambda _: None}
            quantize_gguf(folder / "model", folder / "out", GgufRecipe(type="BF16"), **options)
            made[key] = model, next((folder / "out").glob("*.gguf"))
        return made[key]

    return of


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def differ(path: Path, model: Any) -> float:
    """The largest difference of the file's logits from the model's, relative to the largest of these."""
    wanted = logits(model)
    return float((logits(qconv.load(path, dtype=torch.float32)) - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize(
    ("keys", "drop"),
    [
        ({}, ("llama.rope.scaling.type",)),
        ({"llama.rope.scale_linear": (4.0, FLOAT)}, ("llama.rope.scaling.type", "llama.rope.scaling.factor")),
        ({"llama.rope.scale_linear": (9.0, FLOAT)}, ()),
        ({"llama.rope.scaling.attn_factor": (1.0, FLOAT), "llama.attention.causal": (True, TRUTH)}, ()),
    ],
    ids=["no type", "the old key alone", "the old key beside", "values that say nothing"],
)
def test_a_linear_scale_in_every_spelling(make: Make, tmp_path: Path, keys: dict[str, Key], drop: Any) -> None:
    model, file = make("llama", rope_parameters=LINEAR)
    assert differ(copied(file, tmp_path / "copy.gguf", keys, drop), model) < 2e-5


def test_no_scaling_where_the_type_is_none(make: Make, tmp_path: Path) -> None:
    model, file = make("llama")
    keys = {"llama.rope.scaling.type": ("none", TEXT), "llama.rope.scaling.factor": (4.0, FLOAT)}
    assert differ(copied(file, tmp_path / "copy.gguf", keys), model) < 2e-5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.scaling.attn_factor", (2.0, FLOAT)),
        ("rope.scaling.yarn_beta_fast", (16.0, FLOAT)),
        ("rope.scaling.yarn_log_multiplier", (0.1, FLOAT)),
        ("rope.scaling.type", ("longrope", TEXT)),
        ("rope.dimension_count", (8, COUNT)),
        ("rope.freq_base_swa", (1e5, FLOAT)),
        ("attention.sliding_window", (16, COUNT)),
        ("attention.scale", (0.5, FLOAT)),
        ("attention.causal", (False, TRUTH)),
        ("attention.value_length", (8, COUNT)),
        ("attn_logit_softcapping", (30.0, FLOAT)),
        ("final_logit_softcapping", (30.0, FLOAT)),
        ("logit_scale", (0.5, FLOAT)),
        ("expert_weights_scale", (2.5, FLOAT)),
        ("expert_weights_norm", (False, TRUTH)),
        ("expert_gating_func", (2, COUNT)),
        ("what_nobody_knows", (1, COUNT)),
    ],
)
def test_what_is_not_computed_is_refused_by_name(make: Make, tmp_path: Path, key: str, value: Key) -> None:
    _, file = make("qwen3_moe", norm_topk_prob=True)
    copy = copied(file, tmp_path / "copy.gguf", {f"qwen3moe.{key}": value})
    with pytest.raises(CheckpointError, match="rope scaling 'longrope'" if key.endswith("type") else key):
        GgufFiles.open(copy)


def test_biases_of_some_linears_are_added(make: Make, tmp_path: Path) -> None:
    def all_but_values(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") and "v_proj" not in name:
                parameter.data.zero_()

    model, file = make("llama", all_but_values, attention_bias=True)
    absent = [f"blk.{layer}.{name}" for layer in (0, 1) for name in ZEROS]
    assert differ(copied(file, tmp_path / "copy.gguf", drop=absent), model) < 2e-5


@pytest.mark.parametrize(
    ("family", "name", "size"),
    [
        ("llama", "blk.0.attn_q.scale", 1),
        ("llama", "blk.7.attn_norm.weight", 64),
        ("llama", "rope_factors_long.weight", 8),
        ("qwen3", "rope_freqs.weight", 8),
        ("llama", "per_layer_model_proj.weight", 64),
    ],
)
def test_a_tensor_that_is_not_used_is_refused_by_name(
    make: Make, tmp_path: Path, family: str, name: str, size: int
) -> None:
    _, file = make(family)
    copy = copied(file, tmp_path / "copy.gguf", tensors={name: [1.0] * size})
    with pytest.raises(CheckpointError, match=f"tensor '{name}': qconv computes nothing with it"):
        GgufFiles.open(copy)


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("llama.block_count", (10**9, COUNT), "block_count is 1000000000, and the file holds tensors of 2 layers"),
        ("llama.block_count", (2**64 - 1, GGUFValueType.UINT64), "block_count is 18446744073709551615, not a positive"),
        ("llama.attention.key_length", (2**31 - 2, COUNT), "value_length is 24"),
        ("llama.embedding_length", (2**31 - 2, COUNT), "the file's keys imply"),
        ("llama.attention.head_count", (0, COUNT), "head_count is 0, not a positive"),
        ("llama.feed_forward_length", (float("nan"), FLOAT), "feed_forward_length is nan, not a positive"),
        ("llama.rope.scaling.type", (3, COUNT), "rope.scaling.type is 3, not a text"),
        ("llama.rope.scaling.factor", (-4.0, FLOAT), "rope.scaling.factor is -4.0, not a number from 0"),
        ("llama.expert_count", (10**9, COUNT), "no tensor 'blk.0.ffn_gate_exps.weight'"),
        ("tokenizer.ggml.eos_token_id", (4_000_000_000, COUNT), "eos_token_id is '4000000000', no row"),
        ("tokenizer.ggml.padding_token_id", ("a", TEXT), "padding_token_id is 'a', no row"),
    ],
)
def test_hostile_values_end_at_once(make: Make, tmp_path: Path, key: str, value: Key, error: str) -> None:
    _, file = make("llama")
    copy = copied(file, tmp_path / "copy.gguf", {key: value})
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=error):
        GgufFiles.open(copy)
    assert time.perf_counter() - start < 5.0  # milliseconds; a description of 10^9 layers takes minutes and all memory


def test_every_end_ends_and_sampling_is_the_files(make: Make, tmp_path: Path) -> None:
    _, file = make("llama")
    keys: dict[str, Key] = {
        "tokenizer.ggml.eot_token_id": (7, COUNT),
        "tokenizer.ggml.eom_token_id": (9, COUNT),
        "general.sampling.temp": (0.7, FLOAT),
        "general.sampling.top_k": (20, GGUFValueType.INT32),
        "general.sampling.penalty_repeat": (1.05, FLOAT),
    }
    generation = qconv.load(copied(file, tmp_path / "copy.gguf", keys)).generation_config
    assert generation.eos_token_id == [0, 7, 9, 2]  # <|endoftext|> by its key and <|im_end|> by its text
    assert (generation.do_sample, generation.temperature, generation.top_k) == (True, 0.7, 20)
    assert generation.repetition_penalty == 1.05
