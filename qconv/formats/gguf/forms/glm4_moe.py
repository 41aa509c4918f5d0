"""GLM-4.5 to 4.7: part of each head is rotated, dense layers come first, a sigmoid router with a correction bias."""

from gguf import ExpertGatingFuncType, Keys

from qconv.formats.gguf.forms.base import ATTENTION_BIAS, Experts, Fixed, Form, Stated

FORM = Form(
    architecture="glm4moe",
    model_class="Glm4MoeForCausalLM",
    rotated=lambda config: 0.5,
    predicts=True,
    experts=Experts(
        count=("n_routed_experts",),
        gating=ExpertGatingFuncType.SIGMOID,
        dense_first=lambda dense, layers: {"first_k_dense_replace": dense},
    ),
    stated=(
        Stated(Keys.LLM.EXPERT_SHARED_COUNT, "n_shared_experts", 1, 1),
        Stated(Keys.LLM.EXPERT_WEIGHTS_SCALE, "routed_scaling_factor", 1.0, 1.0),
        Stated(Keys.LLM.EXPERT_WEIGHTS_NORM, "norm_topk_prob", True, False),
    ),
    fixed=(Fixed("n_group", 1, "experts are chosen among all", 1),),
    present={"attention_bias": ATTENTION_BIAS, "use_qk_norm": "attn_(q|k)_norm.weight"},
)
