"""Qwen3.5, 3.6 and 3.8 with experts: as Qwen3-Next, with heads of values in another order."""

from gguf import Keys

from qconv.formats.gguf.forms.base import Experts, Fixed, Form
from qconv.formats.gguf.forms.delta import TILED_DELTA

FORM = Form(
    architecture="qwen35moe",
    model_class="Qwen3_5MoeForCausalLM",
    biases=(),
    rotated=lambda config: 0.25,
    experts=Experts(count=("num_experts",), shared_width="shared_expert_intermediate_size"),
    fixed=(
        Fixed(None, True, key=Keys.LLM.EXPERT_WEIGHTS_NORM),
        Fixed("attention_bias", False, "no linear has a bias", False),
    ),
    present={},
    predicts=True,
    mixing=TILED_DELTA,
)
