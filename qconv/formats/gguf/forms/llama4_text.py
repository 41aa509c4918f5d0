"""Llama 4: a router's score is on what an expert reads, and dense layers may be between those that have experts."""

from gguf import ExpertGatingFuncType, Keys

from qconv.formats.gguf.forms.base import Experts, Fixed, Form, Stated
from qconv.formats.gguf.forms.chunked import CHUNKED, CHUNKS, TEMPERATURE

FORM = Form(
    architecture="llama4",
    model_class="Llama4ForCausalLM",
    biases=(),
    windows=CHUNKS,
    theta=500000.0,
    rope_factors=True,
    experts=Experts(
        count=("num_local_experts",),
        width="intermediate_size",
        gating=ExpertGatingFuncType.SIGMOID,
        every="interleave_moe_layer_step",
    ),
    stated=(Stated(Keys.LLM.INTERLEAVE_MOE_LAYER_STEP, "interleave_moe_layer_step", 1, 1),),
    fixed=(Fixed("attention_bias", False, "no linear has a bias", False), *TEMPERATURE),
    present={},
    mixing=CHUNKED,
)
