"""Seed-OSS dense models."""

from qconv.formats.gguf.forms.base import ATTENTION_BIAS, Form

FORM = Form(architecture="seed_oss", model_class="SeedOssForCausalLM", present={"attention_bias": ATTENTION_BIAS})
