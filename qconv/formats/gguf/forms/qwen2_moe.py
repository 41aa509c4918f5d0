"""Qwen2-MoE: the chosen experts' weights stay as the softmax gives them, and the shared expert has a gate."""

from qconv.formats.gguf.forms.base import ATTENTION_BIAS, NEVER_ONE, Experts, Form

FORM = Form(
    architecture="qwen2moe",
    model_class="Qwen2MoeForCausalLM",
    heads_fill_hidden=True,
    experts=Experts(shared_width="shared_expert_intermediate_size"),
    fixed=(NEVER_ONE,),
    present={"qkv_bias": ATTENTION_BIAS},
)
