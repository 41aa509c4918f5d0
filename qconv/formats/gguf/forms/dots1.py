"""dots.llm1: norms of each head, dense layers come first, a sigmoid router with a correction bias."""

from gguf import ExpertGatingFuncType, Keys

from qconv.formats.gguf.forms.base import Experts, Fixed, Form, Stated

FORM = Form(
    architecture="dots1",
    model_class="Dots1ForCausalLM",
    grouped=False,
    experts=Experts(
        count=("n_routed_experts",),
        gating=ExpertGatingFuncType.SIGMOID,
        dense_first=lambda dense, layers: {"first_k_dense_replace": dense},
    ),
    stated=(
        Stated(Keys.LLM.EXPERT_SHARED_COUNT, "n_shared_experts", 1, 1),
        Stated(Keys.LLM.EXPERT_WEIGHTS_SCALE, "routed_scaling_factor", 1.0, 1.0),
        Stated(Keys.LLM.EXPERT_WEIGHTS_NORM, "norm_topk_prob", False, False),
    ),
    fixed=(Fixed("n_group", 1, "experts are chosen among all", 1),),
)
