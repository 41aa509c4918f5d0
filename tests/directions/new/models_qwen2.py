"""Qwen2 dense models: biased q, k and v."""

from qconv.models.base import Family

FAMILY = Family(qkv_bias=lambda config: True)
