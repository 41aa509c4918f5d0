"""Llama 1 to 3: q and k are permuted, any linear may have a bias, and Llama 3.1's factors are a tensor."""

from qconv.formats.gguf.forms.base import ATTENTION_BIAS, Form

FORM = Form(
    architecture="llama",
    model_class="LlamaForCausalLM",
    pairs=True,
    biases=("q", "k", "v", "o", "gate", "up", "down"),
    theta=10000.0,  # Llama's first models leave it out
    rope_factors=True,
    present={"attention_bias": ATTENTION_BIAS, "mlp_bias": "ffn_(gate|up|down).bias"},
)
