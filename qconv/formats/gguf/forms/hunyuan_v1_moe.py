"""Hunyuan A13B: norms of each head after its rotation, every layer sparse, a shared expert without a gate."""

from gguf import Keys

from qconv.formats.gguf.forms.base import Experts, Fixed, Form

FORM = Form(
    architecture="hunyuan-moe",
    model_class="HunYuanMoEV1ForCausalLM",
    alpha=True,
    experts=Experts(count=("num_experts",), used="moe_topk", width=None),
    fixed=(Fixed(None, True, key=Keys.LLM.EXPERT_WEIGHTS_NORM),),
)
