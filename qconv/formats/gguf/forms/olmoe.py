"""OLMoE: norms of all of q and k, as many key heads as query heads, and weights as the softmax gives them."""

from qconv.core.architecture import Architecture
from qconv.formats.gguf.forms.base import NEVER_ONE, Experts, Fixed, Form, Values


def _differs(config: Values, model: Architecture) -> str | None:
    if model.num_key_value_heads == model.num_attention_heads:
        return None
    return f"num_key_value_heads {model.num_key_value_heads}: the norm of k is as wide as the model"


FORM = Form(
    architecture="olmoe",
    model_class="OlmoeForCausalLM",
    tied=False,
    heads_fill_hidden=True,
    experts=Experts(width=None),
    fixed=(NEVER_ONE, Fixed("clip_qkv", None, "q, k and v are not clipped")),
    differs=_differs,
)
