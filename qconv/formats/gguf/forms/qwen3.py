"""Qwen3 dense models."""

from qconv.formats.gguf.forms.base import Form

FORM = Form(
    architecture="qwen3",
    model_class="Qwen3ForCausalLM",
)
