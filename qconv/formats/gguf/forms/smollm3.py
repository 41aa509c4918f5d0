"""SmolLM3: every fourth layer has no rotary embedding."""

from qconv.formats.gguf.forms.base import Form, without_rotation

FORM = Form(
    architecture="smollm3",
    model_class="SmolLM3ForCausalLM",
    pairs=True,
    differs=without_rotation,
)
