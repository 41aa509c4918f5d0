"""Qwen3.5 dense models: as Qwen3-Next without experts, with heads of values in another order."""

from qconv.formats.gguf.forms.base import Fixed, Form
from qconv.formats.gguf.forms.delta import TILED_DELTA

FORM = Form(
    architecture="qwen35",
    model_class="Qwen3_5ForCausalLM",
    biases=(),
    rotated=lambda config: 0.25,
    fixed=(Fixed("attention_bias", False, "no linear has a bias", False),),
    present={},
    predicts=True,
    mixing=TILED_DELTA,
)
