"""SmolLM3: every fourth layer has no rotary embedding."""

from qconv.core.architecture import Architecture
from qconv.formats.gguf.forms.base import Form, Values


def _differs(config: Values, model: Architecture) -> str | None:
    layers, step = len(model.layers), config.get("no_rope_layer_interval", 4)
    given = config.get("no_rope_layers") or [int((layer + 1) % step != 0) for layer in range(layers)]
    if given == [int((layer + 1) % 4 != 0) for layer in range(layers)]:
        return None
    return "no_rope_layers: every fourth layer, and no other, has no rotary embedding"


FORM = Form(
    architecture="smollm3",
    model_class="SmolLM3ForCausalLM",
    pairs=True,
    differs=_differs,
)
