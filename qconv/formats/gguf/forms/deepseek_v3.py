"""DeepSeek-V3, R1 and V3.1, Kimi-K2: latent attention, and a sigmoid router with a correction bias and groups."""

from gguf import ExpertGatingFuncType

from qconv.formats.gguf.forms.base import Experts, Fixed, Form, routing
from qconv.formats.gguf.forms.latent import LATENT

FORM = Form(
    architecture="deepseek2",
    model_class="DeepseekV3ForCausalLM",
    biases=(),
    experts=Experts(
        count=("n_routed_experts",),
        gating=ExpertGatingFuncType.SIGMOID,
        dense_first=lambda dense, layers: {"first_k_dense_replace": dense},
    ),
    stated=routing(scale=2.5, norm=True, groups=8, chosen=4),
    fixed=(
        Fixed("rope_interleave", True, "neighbours are rotated", True),
        Fixed("attention_bias", False, "no linear has a bias", False),
    ),
    present={},
    mixing=LATENT,
)
