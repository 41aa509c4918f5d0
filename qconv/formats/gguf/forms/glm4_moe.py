"""GLM-4.5 to 4.7: part of each head is rotated, dense layers come first, a sigmoid router with a correction bias."""

from gguf import ExpertGatingFuncType

from qconv.formats.gguf.forms.base import ATTENTION_BIAS, Experts, Form, routing

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
    stated=routing(scale=1.0, norm=True),
    present={"attention_bias": ATTENTION_BIAS, "use_qk_norm": "attn_(q|k)_norm.weight"},
)
