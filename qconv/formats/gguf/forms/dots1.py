"""dots.llm1: norms of each head, dense layers come first, a sigmoid router with a correction bias."""

from gguf import ExpertGatingFuncType

from qconv.formats.gguf.forms.base import Experts, Form, routing

FORM = Form(
    architecture="dots1",
    model_class="Dots1ForCausalLM",
    grouped=False,
    experts=Experts(
        count=("n_routed_experts",),
        gating=ExpertGatingFuncType.SIGMOID,
        dense_first=lambda dense, layers: {"first_k_dense_replace": dense},
    ),
    stated=routing(scale=1.0, norm=False),
)
