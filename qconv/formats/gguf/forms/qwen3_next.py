"""Qwen3-Next and Qwen3-Coder-Next: gated delta rules, full attention in every fourth layer, norms that add one."""

from dataclasses import replace

from qconv.formats.gguf.forms.base import ALWAYS_ONE, Experts, Fixed, Form
from qconv.formats.gguf.forms.delta import DELTA

FORM = Form(
    architecture="qwen3next",
    model_class="Qwen3NextForCausalLM",
    biases=(),
    rotated=lambda config: 0.25,
    experts=Experts(shared_width="shared_expert_intermediate_size"),
    fixed=(replace(ALWAYS_ONE, default=True), Fixed("attention_bias", False, "no linear has a bias", False)),
    present={},
    mixing=DELTA,
)
