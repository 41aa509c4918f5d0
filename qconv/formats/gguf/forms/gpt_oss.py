"""gpt-oss: biases everywhere, attention that may go to a sink, experts whose gate is limited."""

from functools import partial

from qconv.formats.gguf.changes import renamed
from qconv.formats.gguf.forms.base import Experts, Fixed, Form, Mixing, Windows, sliding_layers

FORM = Form(
    architecture="gpt-oss",
    model_class="GptOssForCausalLM",
    biases=("q", "k", "v", "o"),
    tied=False,
    windows=Windows(partial(sliding_layers, period=2), period=2),
    theta=150000.0,
    experts=Experts(count=("num_local_experts",), width=None),
    fixed=(
        Fixed("attention_bias", True, "q, k, v and o have biases", True),
        Fixed("swiglu_limit", 7.0, "gate and up are limited by 7", 7.0),
        Fixed("swiglu_alpha", 1.702, "the gate's slope is 1.702", 1.702),
    ),
    present={},
    mixing=Mixing(
        changes=lambda model, name, shape: renamed(f"{name}.weight", shape) if name.endswith(".sinks") else None
    ),
)
