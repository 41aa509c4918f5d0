"""Rotary embeddings in both spellings, against transformers' own frequencies."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from qconv.errors import CheckpointError, UsageError
from qconv.formats.gguf.rope import rope_of

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 1e6},
        {"rope_theta": 1e6, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        # Builds carry both spellings for engines of any age.
        {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    ],
)
def test_both_spellings_of_the_base(config: dict[str, Any]) -> None:
    rope = rope_of({"model_type": "qwen3_moe", **config})
    assert (rope.theta, rope.kind, rope.parameters) == (1e6, "default", {})


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", **YARN}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", **YARN}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "yarn", **YARN}},
    ],
)
def test_both_spellings_of_a_scaling(config: dict[str, Any]) -> None:
    rope = rope_of({"model_type": "qwen3_moe", **config})
    assert (rope.theta, rope.kind, rope.parameters) == (5e5, "yarn", YARN)


def test_a_base_is_never_guessed() -> None:
    for model_type in ("qwen3_moe", "qwen2_moe", "qwen3", "mixtral"):
        with pytest.raises(CheckpointError, match="lacks rope_theta") as caught:
            rope_of({"model_type": model_type})
        assert "silently wrong" in str(caught.value)
    assert rope_of({"model_type": "llama"}).theta == 10000.0  # documented, and Llama 1 leaves it out


@pytest.mark.parametrize("theta", [0, -1.0, math.inf, math.nan, "1e6", True])
def test_a_base_is_a_positive_number(theta: Any) -> None:
    with pytest.raises(CheckpointError, match="rope_theta"):
        rope_of({"model_type": "qwen3", "rope_theta": theta})


def test_a_scaling_lacks_nothing() -> None:
    for name in LLAMA3:
        stated = {"rope_type": "llama3", **{key: value for key, value in LLAMA3.items() if key != name}}
        with pytest.raises(CheckpointError, match=f"lacks {name}"):
            rope_of({"model_type": "llama", "rope_theta": 5e5, "rope_scaling": stated})
    with pytest.raises(CheckpointError, match="not an object"):
        rope_of({"model_type": "llama", "rope_theta": 5e5, "rope_scaling": "yarn"})


@pytest.mark.parametrize(
    ("stated", "what"),
    [
        ({"rope_type": "longrope"}, "rope scaling 'longrope'"),
        ({"rope_type": "dynamic", "factor": 2.0}, "rope scaling 'dynamic'"),
        ({"rope_type": "yarn", **YARN, "beta_fast": 16}, "beta_fast 16: llama.cpp computes 32"),
        ({"rope_type": "yarn", **YARN, "beta_slow": 2.0}, "beta_slow 2.0: llama.cpp computes 1"),
        ({"rope_type": "yarn", **YARN, "attention_factor": 1.0}, "attention_factor 1.0: llama.cpp computes 1.13863"),
        ({"rope_type": "yarn", **YARN, "mscale": 0.7}, "mscale"),
        ({"rope_type": "yarn", **YARN, "mscale_all_dim": 0.7}, "mscale"),
        ({"rope_type": "yarn", **YARN, "truncate": False}, "truncation"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(stated: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError) as caught:
        rope_of({"model_type": "qwen3", "rope_parameters": {"rope_theta": 1e6, **stated}})
    assert what in caught.value.message


def test_what_only_states_the_usual_is_taken() -> None:
    usual = {"beta_fast": 32, "beta_slow": 1, "attention_factor": 0.1 * math.log(4.0) + 1.0, "truncate": True}
    config = {"model_type": "qwen3", "rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", **YARN, **usual}}
    assert rope_of(config | {"partial_rotary_factor": 1.0}).parameters == YARN


def test_llama3s_factors_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}
    config = LlamaConfig(head_dim=128, max_position_embeddings=131072, rope_parameters=parameters)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    rope = rope_of({"model_type": "llama", "rope_parameters": parameters})
    plain = 5e5 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    # transformers computes in float32, whose exponents of this size are good to some 1e-6.
    torch.testing.assert_close(plain / torch.tensor(rope.factors(128)), expected.double(), rtol=1e-5, atol=0)
    assert {1.0, 8.0} < set(rope.factors(128))  # kept, stretched, and some between


def test_other_kinds_have_no_factors() -> None:
    assert rope_of({"model_type": "qwen3", "rope_theta": 1e6}).factors(128) == ()
