"""Hunyuan 3: norms of each head, a dense layer first, a sigmoid router with a correction bias and a scale."""

from gguf import MODEL_ARCH, ExpertGatingFuncType, Keys

from qconv.formats.gguf.forms.base import Experts, Fixed, Form, Stated

FORM = Form(
    architecture="hy_v3",
    model_class="HYV3ForCausalLM",
    names=MODEL_ARCH.EXAONE_MOE,
    predicts=True,
    experts=Experts(
        count=("num_experts",),
        gating=ExpertGatingFuncType.SIGMOID,
        dense_first=lambda dense, layers: {"mlp_layer_types": ["dense"] * dense + ["sparse"] * (layers - dense)},
    ),
    stated=(
        Stated(Keys.LLM.EXPERT_SHARED_COUNT, "num_shared_experts", 1, 1),
        Stated(Keys.LLM.EXPERT_WEIGHTS_SCALE, "router_scaling_factor", 2.826, 1.0),
    ),
    fixed=(Fixed(None, True, key=Keys.LLM.EXPERT_WEIGHTS_NORM, stated=True),),
)
