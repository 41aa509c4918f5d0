"""Llama 1 to 3 and the models that share its layout."""

from qconv.models.base import Family

FAMILY = Family(
    qkv_bias=lambda config: config.flag("attention_bias", default=False),
    o_bias=lambda config: config.flag("attention_bias", default=False),
    mlp_bias=lambda config: config.flag("mlp_bias", default=False),
)
