"""The key/values of a GGUF file that describe the model, from its config.json.

llama.cpp hard-codes much of an architecture that a config.json can vary; what it cannot express is refused here, since
a file that loads and computes something else is worse than none.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

from gguf import GGML_QUANT_VERSION, GGUFValue, GGUFWriter, LlamaFileType, RopeScalingType

from qconv.checkpoint.config import Config
from qconv.core.architecture import Architecture, Moe
from qconv.errors import CheckpointError, UsageError
from qconv.formats.gguf.names import architecture_name
from qconv.formats.gguf.rope import ROTATES_BY_FACTORS, Rope, rope_of

Metadata: TypeAlias = dict[str, GGUFValue]
"""Keys with their values and the types in which the file holds them, in file order."""

FOLDED = "qconv.scales_folded"
"""Says of a model that scales were folded into it, which leaves its outputs as they are: its weights are not the
source's. llama.cpp does not look at it."""
_RENORMALIZES = {"qwen3_moe": True, "qwen2_moe": False}
"""Whether llama.cpp makes the weights of the chosen experts sum to one: fixed by the architecture."""


def model_metadata(config: dict[str, Any], model: Architecture, name: str, file_type: LlamaFileType) -> Metadata:
    """Everything but the tokenizer.

    Args:
        config: config.json, in old or new spelling.
        model: Its architecture.
        name: What the model is called.
        file_type: What ``general.file_type`` says of the tensors.

    Raises:
        CheckpointError: a key of config.json is missing or malformed.
        UsageError: llama.cpp cannot express the model; says what.
    """
    require_expressible(config, model)
    values = Config(config)
    writer = GGUFWriter(None, architecture_name(model.family))
    writer.add_type("model")
    writer.add_name(name)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_file_type(file_type)

    writer.add_block_count(len(model.layers))
    writer.add_context_length(values.integer("max_position_embeddings"))
    writer.add_embedding_length(model.hidden_size)
    writer.add_vocab_size(model.embedding.out_features)
    writer.add_feed_forward_length(values.integer("intermediate_size", "moe_intermediate_size"))
    writer.add_layer_norm_rms_eps(_rms_epsilon(config))
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_key_value_heads)
    # Without them llama.cpp takes embedding_length / head_count, which is wrong where heads are wider.
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    _add_rope(writer, rope_of(config), model.head_dim)
    _add_experts(writer, model)
    return writer.kv_data[0]


def require_expressible(config: dict[str, Any], model: Architecture) -> None:
    """Check that llama.cpp's graph of the architecture is the one that config.json describes.

    Raises:
        CheckpointError: a key of config.json is malformed.
        UsageError: it is not; says where they differ.
    """
    values = Config(config)
    reason = None
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        reason = f"hidden_act {config['hidden_act']!r}: the activation is always silu"
    elif _slides(config):
        reason = "sliding-window attention: every layer attends to the whole context"
    elif model.family in _RENORMALIZES:
        # transformers takes an absent key as false, for both families.
        if values.flag("norm_topk_prob", default=False) != _RENORMALIZES[model.family]:
            fixed = "always" if _RENORMALIZES[model.family] else "never"
            reason = f"norm_topk_prob {config.get('norm_topk_prob')!r}: the chosen experts' weights {fixed} sum to one"
        elif not all(isinstance(layer.mlp, Moe) for layer in model.layers):
            dense = next(layer.index for layer in model.layers if not isinstance(layer.mlp, Moe))
            reason = f"layer {dense} is dense (mlp_only_layers, decoder_sparse_step): every layer has experts"
    if reason is None:
        reason = _attention_difference(model)
    if reason is None and architecture_name(model.family) != ROTATES_BY_FACTORS:
        factors = rope_of(config).factors(model.head_dim)
        reason = "rope_type 'llama3': the tensor of its factors is not read" if factors else None
    if reason is not None:
        raise UsageError(
            f"config.json: {reason} in llama.cpp's {architecture_name(model.family)}.",
            hint="This model cannot be written as GGUF.",
        )


def _attention_difference(model: Architecture) -> str | None:
    """What llama.cpp's attention of the architecture has no place for, or None."""
    queries = model.num_attention_heads * model.head_dim
    if model.head_dim % 2:
        return f"head_dim {model.head_dim} is odd: rotary embeddings need pairs"
    if model.family == "qwen2_moe" and queries != model.hidden_size:
        return f"{model.num_attention_heads} heads of {model.head_dim}: together they are hidden_size wide"
    if model.family in ("qwen3", "qwen3_moe") and any(layer.attention.o.bias for layer in model.layers):
        return "attention_bias: the output projection has no bias"
    return None


def _slides(config: dict[str, Any]) -> bool:
    """Whether a layer attends to a window. Qwen's configs give a window and switch it off."""
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and any(kind != "full_attention" for kind in kinds):
        return True
    window = config.get("sliding_window")
    switched_on = config.get("use_sliding_window", config.get("model_type") == "mixtral")
    return window is not None and bool(switched_on)


def _rms_epsilon(config: dict[str, Any]) -> float:
    value = config.get("rms_norm_eps")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < math.inf:
        raise CheckpointError(
            f"config.json: rms_norm_eps is {value!r}, not a positive number.", hint="Repair config.json."
        )
    return float(value)


def _add_rope(writer: GGUFWriter, rope: Rope, head_dim: int) -> None:
    writer.add_rope_dimension_count(head_dim)
    # Never left out: llama.cpp would take 10000, load, and be silently wrong.
    writer.add_rope_freq_base(rope.theta)
    values = rope.parameters
    if rope.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope.kind))
        writer.add_rope_scaling_factor(values["factor"])
    if rope.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(values["original_max_position_embeddings"]))


def _add_experts(writer: GGUFWriter, model: Architecture) -> None:
    moe = model.layers[0].mlp
    if not isinstance(moe, Moe):
        return
    writer.add_expert_count(len(moe.experts))
    writer.add_expert_used_count(moe.top_k)
    writer.add_expert_feed_forward_length(moe.experts[0].gate.out_features)
    if moe.shared_expert is not None:
        writer.add_expert_shared_feed_forward_length(moe.shared_expert.gate.out_features)
