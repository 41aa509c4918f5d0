"""Qwen3-MoE: Qwen3-Coder-480B-A35B, Qwen3-Coder-30B-A3B, Qwen3-235B-A22B."""

from qconv.models.base import Family, sparse_by_step

FAMILY = Family(
    qkv_bias=lambda config: config.flag("attention_bias", default=False),
    o_bias=lambda config: config.flag("attention_bias", default=False),
    head_norm=True,
    sparse=sparse_by_step,
)
