"""Qwen3 dense models: per-head norms of q and k."""

from qconv.models.base import Family

FAMILY = Family(
    qkv_bias=lambda config: config.flag("attention_bias", default=False),
    o_bias=lambda config: config.flag("attention_bias", default=False),
    head_norm=True,
    head_dim=128,
)
