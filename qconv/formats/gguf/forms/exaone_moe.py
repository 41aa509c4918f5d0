"""K-EXAONE: rotary embeddings in the layers with a window alone, a sigmoid router with a correction bias."""

from gguf import ExpertGatingFuncType, Keys

from qconv.formats.gguf.forms.base import Experts, Fixed, Form, Stated, sliding_layers

FORM = Form(
    architecture="exaone-moe",
    model_class="ExaoneMoeForCausalLM",
    rope_factors=True,
    windows=sliding_layers,
    experts=Experts(
        count=("num_experts",),
        gating=ExpertGatingFuncType.SIGMOID,
        dense_first=lambda dense, layers: {"first_k_dense_replace": dense},
    ),
    stated=(
        Stated(Keys.LLM.EXPERT_SHARED_COUNT, "num_shared_experts", 1, 1),
        Stated(Keys.LLM.EXPERT_WEIGHTS_SCALE, "routed_scaling_factor", 2.5, 1.0),
        Stated(Keys.LLM.EXPERT_WEIGHTS_NORM, "norm_topk_prob", True, False),
    ),
    fixed=(Fixed("n_group", 1, "experts are chosen among all", 1),),
    predicts=True,
)
