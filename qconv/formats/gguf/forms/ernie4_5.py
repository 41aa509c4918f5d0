"""Ernie 4.5 dense models: rotate neighbours in transformers too."""

from qconv.formats.gguf.forms.base import Form

FORM = Form(architecture="ernie4_5", model_class="Ernie4_5ForCausalLM", present={"use_bias": "attn_output.bias"})
