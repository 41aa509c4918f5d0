"""Small models of the families that have a GGUF form beside those that tests/conftest.py has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.conftest import EXPERTS, random_model, save_model
from tests.gguf_copies import copied

THREE = {"num_hidden_layers": 3}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
MSCALE = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}
ALPHA = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}
"""With the bounds that Llama 4 has, both the same."""
LLAMA4 = {"num_local_experts": 6, "intermediate_size": 32, "intermediate_size_mlp": 96}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "head_dim": 32,
}
LATENT: dict[str, Any] = {
    "head_dim": 8,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 32,
    "v_head_dim": 24,
    "n_routed_experts": 12,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "glm4_moe": (
        "glm4_moe",
        EXPERTS | THREE | {"n_routed_experts": 6, "first_k_dense_replace": 1, "routed_scaling_factor": 1.7},
    ),
    "glm4_moe-all-else": (
        "glm4_moe",
        EXPERTS
        | THREE
        | {"n_routed_experts": 6, "first_k_dense_replace": 2, "n_shared_experts": 2, "norm_topk_prob": False}
        | {"attention_bias": True, "use_qk_norm": True, "partial_rotary_factor": 0.25, "n_group": 3, "topk_group": 2},
    ),
    "solar_open": ("solar_open", EXPERTS | {"n_routed_experts": 6, "rope_parameters": YARN}),
    "minimax_m2": ("minimax_m2", {"num_local_experts": 6, "num_experts_per_tok": 2, "rotary_dim": 12}),
    "ernie4_5_moe": ("ernie4_5_moe", EXPERTS | THREE | {"moe_num_experts": 6, "moe_k": 2}),
    "ernie4_5_moe-none-shared": (
        "ernie4_5_moe",
        EXPERTS | THREE | {"moe_num_experts": 6, "moe_k": 2, "moe_num_shared_experts": 0, "tie_word_embeddings": False},
    ),
    "hy_v3": ("hy_v3", EXPERTS | THREE | {"num_experts": 6}),
    "exaone_moe": ("exaone_moe", EXPERTS | {"num_experts": 6, "num_hidden_layers": 5, "sliding_window": 16}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {"num_experts": 6, "moe_topk": 2, "rope_parameters": ALPHA}),
    "dots1": (
        "dots1",
        EXPERTS
        | THREE
        | {"n_routed_experts": 6, "n_shared_experts": 2, "norm_topk_prob": True}
        # Its sliding window begins at layer 62.
        | {"first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "max_window_layers": 3}
        | {"num_key_value_heads": 4},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        EXPERTS | THREE | LATENT | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "glm4_moe_lite": ("glm4_moe_lite", EXPERTS | THREE | LATENT | {"n_group": 1, "topk_group": 1}),
    "qwen3_next": (
        "qwen3_next",
        EXPERTS | {"num_experts": 6, "shared_expert_intermediate_size": 64, "num_hidden_layers": 4} | DELTA,
    ),
    "qwen3_5_moe_text": (
        "qwen3_5_moe_text",
        EXPERTS | {"num_experts": 6, "shared_expert_intermediate_size": 64, "num_hidden_layers": 4} | DELTA,
    ),
    "qwen3_5_text": ("qwen3_5_text", {"num_hidden_layers": 4, "tie_word_embeddings": True} | DELTA),
    "gpt_oss": (
        "gpt_oss",
        {"num_local_experts": 6, "num_experts_per_tok": 2, "num_hidden_layers": 3, "sliding_window": 16}
        | {"rope_parameters": YARN},
    ),
    "llama4_text": (
        "llama4_text",
        LLAMA4 | {"num_hidden_layers": 5, "num_experts_per_tok": 1, "rope_parameters": LLAMA3},
    ),
    "llama4_text-interleaved": (
        "llama4_text",
        LLAMA4 | {"num_hidden_layers": 4, "interleave_moe_layer_step": 2, "num_experts_per_tok": 2},
    ),
    "olmoe": ("olmoe", {"num_experts": 6, "num_experts_per_tok": 2, "num_key_value_heads": 4, "head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"head_dim": 16}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "pad_token_id": None}),
    "ernie4_5": ("ernie4_5", {}),
    "seed_oss": ("seed_oss", {"attention_bias": True, "pad_token_id": None}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"rope_parameters": ALPHA}),
}
"""A family and its changes, by what it shows."""
_WIDE = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256, "moe_intermediate_size": 256}
_WIDE_LATENT = {
    "kv_lora_rank": 256,
    "q_lora_rank": 256,
    "qk_nope_head_dim": 256,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
}


_WIDE_DELTA = {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "shared_expert_intermediate_size": 256}
_WIDE_LLAMA4 = {"intermediate_size_mlp": 256}


def wide(name: str) -> dict[str, Any]:
    """Changes to rows that the K-quants' blocks divide."""
    own = MODELS[name][1]
    return _WIDE | {key: value for key, value in (_WIDE_LATENT | _WIDE_DELTA | _WIDE_LLAMA4).items() if key in own}


def model_of(name: str, **changes: Any) -> Any:
    """A random transformers model in float32."""
    family, own = MODELS[name]
    return random_model(family, **own | changes)


def saved(name: str, folder: Path, **changes: Any) -> tuple[Any, Path]:
    """The same, and its checkpoint in bf16."""
    model = model_of(name, **changes)
    return model, save_model(model, folder)


def with_joined_split(file: Path, target: Path) -> Path:
    """Qwen3-Next's file in F32 as llama.cpp's own converter writes it: q, k and v of all heads, and z by itself."""
    keys, size, grouped = 2, 16, 2
    read = {one.name: one.data for one in gguf.GGUFReader(str(file)).tensors}
    drop: list[str] = []
    added: dict[str, Any] = {}
    for layer in (0, 1, 2):
        name = f"blk.{layer}.ssm_in.weight"
        heads = read[name].reshape(keys, (2 + 2 * grouped) * size, -1)
        edges = [size, 2 * size, (2 + grouped) * size]
        q, k, v, z = (part.reshape(-1, heads.shape[-1]) for part in np.split(heads, edges, axis=1))
        added |= {f"blk.{layer}.attn_qkv.weight": np.concatenate([q, k, v]), f"blk.{layer}.attn_gate.weight": z}
        drop.append(name)
    return copied(file, target, drop=drop, tensors=added)
