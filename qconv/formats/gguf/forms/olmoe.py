"""OLMoE: norms of all of q and k, as many key heads as query heads, and weights as the softmax gives them."""

from qconv.formats.gguf.forms.base import NEVER_ONE, Experts, Fixed, Form

FORM = Form(
    architecture="olmoe",
    model_class="OlmoeForCausalLM",
    grouped=False,
    tied=False,
    heads_fill_hidden=True,
    experts=Experts(width=None),
    fixed=(NEVER_ONE, Fixed("clip_qkv", None, "q, k and v are not clipped")),
)
