"""Qwen3-MoE: every layer has experts, whose weights sum to one."""

from qconv.formats.gguf.forms.base import ALWAYS_ONE, Experts, Form

FORM = Form(
    architecture="qwen3moe",
    model_class="Qwen3MoeForCausalLM",
    experts=Experts(),
    fixed=(ALWAYS_ONE,),
)
