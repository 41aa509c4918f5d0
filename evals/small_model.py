"""A random model with the bundled one's tokenizer, small enough to quantize hundreds of times."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from evals.options import TINY

_COMPANIONS = ("tokenizer", "chat_template", "generation_config")


def save_small_model(folder: Path, *, width: int, experts: int, head_dim: int, max_shard_size: str = "1GB") -> None:
    """Write a Qwen3-MoE of two layers as a bf16 checkpoint.

    Args:
        folder: Where to; made if absent.
        width: Of the residual stream and of every expert.
        experts: A layer; two are chosen for a token.
        head_dim: Of the heads, which divides the width; two share a key-value head.
        max_shard_size: As transformers takes it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=len(AutoTokenizer.from_pretrained(TINY)),
        hidden_size=width,
        moe_intermediate_size=width,
        num_hidden_layers=2,
        num_experts=experts,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_attention_heads=width // head_dim,
        num_key_value_heads=width // head_dim // 2,
        head_dim=head_dim,
    )
    # transformers does not say what from_config takes and returns.
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    for file in TINY.iterdir():
        if file.name.startswith(_COMPANIONS):
            shutil.copy(file, folder)
