"""K-EXAONE: rotary embeddings in the layers with a window alone, a sigmoid router with a correction bias."""

from gguf import ExpertGatingFuncType

from qconv.formats.gguf.forms.base import Experts, Form, Windows, routing, sliding_layers

FORM = Form(
    architecture="exaone-moe",
    model_class="ExaoneMoeForCausalLM",
    rope_factors=True,
    windows=Windows(sliding_layers),
    experts=Experts(
        count=("num_experts",),
        gating=ExpertGatingFuncType.SIGMOID,
        dense_first=lambda dense, layers: {"first_k_dense_replace": dense},
    ),
    stated=routing(scale=2.5, norm=True, shared="num_shared_experts"),
    predicts=True,
)
