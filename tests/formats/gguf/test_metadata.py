"""What a GGUF file says of its model, and what it cannot say."""

from __future__ import annotations

from typing import Any

import pytest
from gguf import GGUFValueType, LlamaFileType

from qconv.building.bench import SliceShape
from qconv.errors import CheckpointError, UsageError
from qconv.formats.gguf.metadata import model_metadata
from qconv.models import architecture
from tests.conftest import FAMILIES, SIZES

CONFIG_480B = SliceShape().config(62, 160)


def keys_of(config: dict[str, Any]) -> dict[str, Any]:
    metadata = model_metadata(config, architecture(config), "model", LlamaFileType.MOSTLY_Q4_K_M)
    return {key: value.value for key, value in metadata.items()}


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    values = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "norm_topk_prob": family == "qwen3_moe", "head_dim": 16}
    return SIZES | FAMILIES[family] | {"model_type": family} | values | changes


def test_the_480b_says_what_llama_cpp_needs() -> None:
    assert keys_of(CONFIG_480B) == {
        "general.architecture": "qwen3moe",
        "general.type": "model",
        "general.name": "model",
        "general.quantization_version": 2,
        "general.file_type": 15,
        "qwen3moe.block_count": 62,
        "qwen3moe.context_length": 262144,
        "qwen3moe.embedding_length": 6144,
        "qwen3moe.vocab_size": 151936,
        "qwen3moe.feed_forward_length": 2560,
        "qwen3moe.attention.layer_norm_rms_epsilon": 1e-6,
        "qwen3moe.attention.head_count": 96,
        "qwen3moe.attention.head_count_kv": 8,
        "qwen3moe.attention.key_length": 128,  # not 6144 / 96 = 64
        "qwen3moe.attention.value_length": 128,
        "qwen3moe.rope.dimension_count": 128,
        "qwen3moe.rope.freq_base": 1e7,
        "qwen3moe.expert_count": 160,
        "qwen3moe.expert_used_count": 8,
        "qwen3moe.expert_feed_forward_length": 2560,
    }


def test_values_have_the_types_that_llama_cpp_reads() -> None:
    metadata = model_metadata(CONFIG_480B, architecture(CONFIG_480B), "model", LlamaFileType.MOSTLY_Q4_K_M)
    for key, value in metadata.items():
        kind = GGUFValueType.UINT32
        if key.endswith(("epsilon", "freq_base")):
            kind = GGUFValueType.FLOAT32
        elif isinstance(value.value, str):
            kind = GGUFValueType.STRING
        assert value.type == kind, key


def test_old_and_new_spellings_say_the_same() -> None:
    old = CONFIG_480B
    new = {key: value for key, value in old.items() if key not in ("num_experts", "rope_theta", "rope_scaling")}
    new |= {"num_local_experts": 160, "rope_parameters": {"rope_theta": 1e7, "rope_type": "default"}}
    assert keys_of(new) == keys_of(old)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "llama"),
        ("mixtral", "llama"),
        ("qwen2_moe", "qwen2moe"),
        ("qwen3", "qwen3"),
        ("qwen3_moe", "qwen3moe"),
    ],
)
def test_every_family_has_its_architecture(family: str, name: str) -> None:
    keys = keys_of(config_of(family))
    assert keys["general.architecture"] == name
    assert keys[f"{name}.block_count"] == 2
    assert (f"{name}.expert_count" in keys) == ("num_experts_per_tok" in FAMILIES[family])


def test_the_shared_expert_has_its_own_width() -> None:
    keys = keys_of(config_of("qwen2_moe"))
    assert keys["qwen2moe.expert_feed_forward_length"] == 32
    assert keys["qwen2moe.expert_shared_feed_forward_length"] == 64


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen2_moe"])
def test_llama3s_factors_are_refused_where_llama_cpp_reads_no_tensor_of_them(family: str) -> None:
    """Its loader counts tensors, and refuses a file with one that its graph does not use."""
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    with pytest.raises(UsageError, match="rope_type 'llama3'"):
        keys_of(config_of(family, rope_scaling=llama3 | {"original_max_position_embeddings": 64}))
    linear = {"rope_type": "linear", "factor": 4.0}
    assert any(key.endswith("rope.scaling.factor") for key in keys_of(config_of(family, rope_scaling=linear)))


def test_yarn_and_linear_are_scalings_and_llama3_is_a_tensor() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    keys = keys_of(config_of("qwen3", rope_parameters=yarn))
    assert keys["qwen3.rope.scaling.type"] == "yarn"
    assert keys["qwen3.rope.scaling.factor"] == 4.0
    assert keys["qwen3.rope.scaling.original_context_length"] == 64
    keys = keys_of(config_of("llama", rope_scaling={"type": "linear", "factor": 2.0}))
    assert (keys["llama.rope.scaling.type"], keys["llama.rope.scaling.factor"]) == ("linear", 2.0)
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    keys = keys_of(config_of("llama", rope_scaling=llama3 | {"original_max_position_embeddings": 64}))
    assert not any("scaling" in key for key in keys)


@pytest.mark.parametrize(
    ("family", "changes", "what"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob False: the chosen experts' weights always sum to one"),
        ("qwen3_moe", {"norm_topk_prob": None}, "norm_topk_prob"),
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob True: the chosen experts' weights never sum to one"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "layer 1 is dense"),
        ("qwen2_moe", {"decoder_sparse_step": 2}, "layer 0 is dense"),
        ("qwen3_moe", {"attention_bias": True}, "the output projection has no bias"),
        ("qwen3", {"attention_bias": True}, "the output projection has no bias"),
        ("qwen2_moe", {"head_dim": 24}, "4 heads of 24: together they are hidden_size wide"),
        ("llama", {"head_dim": 15}, "head_dim 15 is odd"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("qwen3", {"sliding_window": 128, "use_sliding_window": True}, "sliding-window"),
        ("mixtral", {"sliding_window": 128}, "sliding-window"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused(family: str, changes: dict[str, Any], what: str) -> None:
    config = {key: value for key, value in (config_of(family) | changes).items() if value is not None}
    with pytest.raises(UsageError) as caught:
        keys_of(config)
    assert what in caught.value.message
    assert "llama.cpp's" in caught.value.message


def test_a_window_that_is_switched_off_is_none() -> None:
    keys_of(config_of("qwen3", sliding_window=128, use_sliding_window=False))
    keys_of(config_of("mixtral", sliding_window=None))


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "max_position_embeddings", "intermediate_size"])
def test_a_missing_key_is_named(key: str) -> None:
    config = config_of("qwen3")
    model = architecture(config)
    del config[key]
    with pytest.raises(CheckpointError, match=key):
        model_metadata(config, model, "model", LlamaFileType.ALL_F32)


@pytest.mark.parametrize("value", [0, -1e-6, "1e-6", True, float("nan")])
def test_epsilon_is_a_positive_number(value: Any) -> None:
    with pytest.raises(CheckpointError, match="rms_norm_eps"):
        keys_of(config_of("qwen3", rms_norm_eps=value))
