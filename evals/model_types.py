"""Small random models of many types, made of transformers' own config classes: what discovery is tried on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from evals.options import TINY

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 20,
    "kv_lora_rank": 18,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "max_position_embeddings": 128,
    "sliding_window": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""What a config has of these becomes so small."""
TYPES: dict[str, dict[str, Any]] = {
    # mixtures of experts
    "qwen3_next": {"layer_types": ["linear_attention", "linear_attention", "full_attention"]},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "linear_attention", "full_attention"]},
    "glm4_moe": {},
    "deepseek_v3": {"num_key_value_heads": 4, "head_dim": 8},
    "minimax_m2": {},
    "gpt_oss": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "ernie4_5_moe": {},
    "olmoe": {},
    "phimoe": {},
    "exaone_moe": {"layer_types": None},
    "hy_v3": {},
    "dots1": {},
    "hunyuan_v1_moe": {},
    "laguna": {},
    "mellum": {},
    "deepseek_v2": {"num_key_value_heads": 4, "head_dim": 8},
    "deepseek_v32": {"num_key_value_heads": 4, "head_dim": 8},
    "glm_moe_dsa": {"num_key_value_heads": 4, "head_dim": 8},
    "glm4_moe_lite": {"num_key_value_heads": 4, "head_dim": 8},
    "solar_open": {},
    "llama4_text": {"layer_types": None, "attn_temperature_tuning": False, "intermediate_size_mlp": 56},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "mixtral": {},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    # dense
    "llama": {},
    "qwen3": {"layer_types": None},
    "mistral": {},
    "ernie4_5": {},
    "seed_oss": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "qwen3_5_text": {"layer_types": ["linear_attention", "linear_attention", "full_attention"]},
    "internlm3": {},
    "iquestcoder": {},
    "ministral3": {},
    "cwm": {"layer_types": None},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_state": 16},
    "youtu": {"num_key_value_heads": 4, "head_dim": 8},
    "qwen2": {},
    "smollm3": {"layer_types": None, "no_rope_layers": None},
    "phi3": {},
    "gemma2": {"layer_types": None},
    "starcoder2": {},
    "granite": {},
    "olmo2": {},
    "cohere2": {"layer_types": None},
    "gemma": {},
}


def config_of(model_type: str) -> Any:
    """A small config of a type, made of what transformers' default has."""
    default = AutoConfig.for_model(model_type)
    changes = {name: value for name, value in SMALL.items() if hasattr(default, name)} | TYPES.get(model_type, {})
    kept = {name: changes[name] for name in changes if changes[name] is not None}
    return AutoConfig.for_model(model_type, **kept)


def model_of(config: Any) -> Any:
    """A random model whose norms and biases are not trivial either."""
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    untyped: Any = AutoModelForCausalLM
    made = untyped.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


WIDTHS = {
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "v_head_dim": 16,
}
"""What groups of 32 divide."""


def save_random(model_type: str, folder: Path, dtype: torch.dtype, vocabulary: int) -> Path:
    """A random checkpoint of a type, as transformers saves it, with the bundled model's tokenizer.

    Args:
        model_type: One of :data:`TYPES`.
        folder: Where it goes.
        dtype: Of its tensors.
        vocabulary: As the tokenizer has.
    """
    config = config_of(model_type)
    values = {name: value for name, value in WIDTHS.items() if hasattr(config, name)} | {"vocab_size": vocabulary}
    model = model_of(type(config)(**config.to_dict() | values))
    model.to(dtype).save_pretrained(folder, max_shard_size="300KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    return folder
