"""Qwen2 and Qwen2.5 dense models: biased q, k and v."""

from qconv.formats.gguf.forms.base import Form

FORM = Form(architecture="qwen2", model_class="Qwen2ForCausalLM", heads_fill_hidden=True, present={})
