"""Hunyuan dense models: norms of each head after its rotation."""

from qconv.formats.gguf.forms.base import Form

FORM = Form(architecture="hunyuan-dense", model_class="HunYuanDenseV1ForCausalLM", alpha=True)
