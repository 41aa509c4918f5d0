"""Qwen2-MoE and Qwen1.5-MoE: biased q, k and v, and a gated shared expert beside the routed ones."""

from qconv.models.base import Family, sparse_by_step

FAMILY = Family(
    qkv_bias=lambda config: config.flag("qkv_bias", default=True),
    sparse=sparse_by_step,
    shared_expert=True,
)
