"""Mixtral is llama.cpp's llama with experts."""

from gguf import Keys

from qconv.formats.gguf.forms.base import Experts, Fixed, Form

FORM = Form(
    architecture="llama",
    model_class="MixtralForCausalLM",
    pairs=True,
    window=True,
    rope_factors=True,
    experts=Experts(width=None),
    fixed=(Fixed(None, True, key=Keys.LLM.EXPERT_WEIGHTS_NORM),),
)
