"""Ernie 4.5 with experts: rotates neighbours in transformers too, dense layers come first, a softmax with a bias."""

from gguf import Keys

from qconv.formats.gguf.forms.base import Experts, Fixed, Form, Stated

FORM = Form(
    architecture="ernie4_5-moe",
    model_class="Ernie4_5_MoeForCausalLM",
    experts=Experts(
        count=("moe_num_experts",),
        used="moe_k",
        dense_first=lambda dense, layers: {"moe_layer_start_index": dense},
    ),
    stated=(
        Stated(Keys.LLM.INTERLEAVE_MOE_LAYER_STEP, "moe_layer_interval", 1, 1),
        Stated(Keys.LLM.EXPERT_SHARED_COUNT, "moe_num_shared_experts", 2, 0),
    ),
    fixed=(Fixed(None, True, key=Keys.LLM.EXPERT_WEIGHTS_NORM),),
    present={"use_bias": "attn_(q|k|v|output).bias"},
)
