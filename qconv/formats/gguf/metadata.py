"""The key/values of a GGUF file that describe the model, from its config.json.

llama.cpp hard-codes much of an architecture that a config.json can vary; what it cannot express is refused here, since
a file that loads and computes something else is worse than none.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

from gguf import (
    GGML_QUANT_VERSION,
    ExpertGatingFuncType,
    GGUFValue,
    GGUFValueType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
)

from qconv.checkpoint.config import Config, language_part
from qconv.core.architecture import Architecture, Attention, Moe
from qconv.errors import CheckpointError, UsageError
from qconv.formats.gguf.forms import Form, form
from qconv.formats.gguf.forms.base import Fixed, Stated, by_period
from qconv.formats.gguf.rope import Rope, rope_of

Metadata: TypeAlias = dict[str, GGUFValue]
"""Keys with their values and the types in which the file holds them, in file order."""

FOLDED = "qconv.scales_folded"
"""Says of a model that scales were folded into it, which leaves its outputs as they are: its weights are not the
source's. llama.cpp does not look at it."""
_PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "output", "gate": "gate", "up": "up", "down": "down"}
_TYPES = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}


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
    config = language_part(config)
    values, of = Config(config), form(model.family)
    writer = GGUFWriter(None, of.architecture)
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
    _add_rope(writer, rope_of(config), rotated_head(config, model))
    if of.windows is not None:
        writer.add_sliding_window(values.integer(of.windows.size, default=of.windows.only))
        if of.windows.period is None:
            writer.add_sliding_window_pattern(of.windows.which(config, len(model.layers)))
    _add_experts(writer, model, of)
    for fixed in of.fixed:
        if fixed.key is not None and fixed.stated:
            writer.add_key_value(fixed.key.format(arch=of.architecture), fixed.value, _TYPES[type(fixed.value)])
    for stated in of.stated:
        key = stated.key.format(arch=of.architecture)
        writer.add_key_value(key, stated_value(config, stated), _TYPES[type(stated.default)])
    metadata: Metadata = writer.kv_data[0]
    for key, value in of.mixing.states(config, model).items():
        full = key.format(arch=of.architecture)
        if isinstance(value, list):
            metadata[full] = GGUFValue(value, GGUFValueType.ARRAY, GGUFValueType.INT32)
        else:
            metadata[full] = GGUFValue(value, _TYPES[type(value)])
    return metadata


def require_expressible(config: dict[str, Any], model: Architecture) -> None:
    """Check that llama.cpp's graph of the architecture is the one that config.json describes.

    Raises:
        CheckpointError: a key of config.json is malformed.
        UsageError: it is not; says where they differ.
    """
    config, of = language_part(config), form(model.family)
    reason = (
        _activation_difference(config)
        or _attention_difference(config, model, of)
        or next((found for fixed in of.fixed if (found := _fixed_difference(config, fixed)) is not None), None)
        or _layer_difference(config, model, of)
        or of.mixing.differs(config, model)
        or of.differs(config, model)
    )
    if reason is not None:
        raise UsageError(
            f"config.json: {reason} in llama.cpp's {of.architecture}.", hint="This model cannot be written as GGUF."
        )
    head_dim = rotated_head(config, model)
    rotated = rope_of(config).rotated(head_dim)
    if rotated % 2:
        raise UsageError(
            f"config.json: {rotated} of {head_dim} channels of a head are rotated: llama.cpp rotates pairs.",
            hint="This model cannot be written as GGUF.",
        )


def rotated_head(config: dict[str, Any], model: Architecture) -> int:
    """The width of a head, of latent attention of the one that is rotated."""
    return Config(config).integer("qk_rope_head_dim") if form(model.family).mixing.latent else model.head_dim


def stated_value(config: dict[str, Any], stated: Stated) -> bool | int | float:
    """What config.json says of a value that the file states.

    Raises:
        CheckpointError: it is of another type.
    """
    values = Config(config)
    if isinstance(stated.default, bool):
        return values.flag(stated.config, stated.default)
    if isinstance(stated.default, int):
        none = stated.absent == 0 and config.get(stated.config) == 0
        return 0 if none else values.integer(stated.config, default=stated.default)
    given = values.positive(stated.config)
    return stated.default if given is None else given


def _activation_difference(config: dict[str, Any]) -> str | None:
    if config.get("hidden_act", "silu") in ("silu", "swish"):
        return None
    return f"hidden_act {config['hidden_act']!r}: the activation is always silu"


def _attention_difference(config: dict[str, Any], model: Architecture, of: Form) -> str | None:
    queries = model.num_attention_heads * model.head_dim
    if _slides(config, of):
        return "sliding-window attention: every layer attends to the whole context"
    layers, windows = len(model.layers), of.windows
    if windows is not None and windows.only is not None and config.get(windows.size, windows.only) != windows.only:
        return f"{windows.size} {config[windows.size]!r}: it is {windows.only}"
    period = None if windows is None else windows.period
    if windows is not None and period is not None and windows.which(config, layers) != by_period(layers, period):
        return f"layer_types: all layers but each {period}. attend to a window"
    if model.head_dim % 2:
        return f"head_dim {model.head_dim} is odd: rotary embeddings need pairs"
    if not of.grouped and model.num_key_value_heads != model.num_attention_heads:
        return f"num_key_value_heads {model.num_key_value_heads}: every query head has a key head of its own"
    if of.heads_fill_hidden and queries != model.hidden_size:
        return f"{model.num_attention_heads} heads of {model.head_dim}: together they are hidden_size wide"
    return None


def _fixed_difference(config: dict[str, Any], fixed: Fixed) -> str | None:
    """What a key of config.json has that llama.cpp has otherwise, or None.

    Raises:
        CheckpointError: it is to be true or false, and is neither.
    """
    if fixed.config is None:
        return None
    if isinstance(fixed.value, bool):
        said = Config(config).flag(fixed.config, bool(fixed.default))
    else:
        said = config.get(fixed.config, fixed.default)
    return None if said == fixed.value else f"{fixed.config} {config.get(fixed.config)!r}: {fixed.because}"


def _layer_difference(config: dict[str, Any], model: Architecture, of: Form) -> str | None:
    for layer in model.layers:
        mixer = layer.attention
        named = dict(zip("qkvo", mixer.linears(), strict=True)) if isinstance(mixer, Attention) else {}
        for mlp in () if isinstance(layer.mlp, Moe) else layer.mlps():
            named |= {"gate": mlp.gate, "up": mlp.up, "down": mlp.down}
        for role, linear in named.items():
            if linear.bias and role not in of.biases:
                return f"{linear.name}.bias: the {_PROJECTIONS[role]} projection has no bias"
    if model.lm_head is None and not of.tied:
        return "tie_word_embeddings: the head is a tensor of its own"
    if of.experts is None:
        return None
    dense = [layer.index for layer in model.layers if not isinstance(layer.mlp, Moe)]
    if of.experts.every is not None:
        step = config.get(of.experts.every, 1)
        return None if dense == _between(len(model.layers), step) else f"each {step}. layer has experts, and no other"
    if of.experts.dense_first is None and dense:
        return f"layer {dense[0]} is dense: every layer has experts"
    later = [index for number, index in enumerate(dense) if index != number]
    return f"layer {later[0]} is dense behind one that has experts: dense layers come first" if later else None


def _between(layers: int, step: int) -> list[int]:
    """The layers that have no experts where each ``step``-th has."""
    return [layer for layer in range(layers) if (layer + 1) % step]


def _slides(config: dict[str, Any], of: Form) -> bool:
    """Whether a layer attends to a window that cannot be said. Qwen's configs give a window and switch it off."""
    if of.windows is not None:
        return False
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and not {"full_attention", "linear_attention"}.issuperset(map(str, kinds)):
        return True
    return config.get("sliding_window") is not None and bool(config.get("use_sliding_window", of.window))


def _rms_epsilon(config: dict[str, Any]) -> float:
    value = config.get("rms_norm_eps")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < math.inf:
        raise CheckpointError(
            f"config.json: rms_norm_eps is {value!r}, not a positive number.", hint="Repair config.json."
        )
    return float(value)


def _add_rope(writer: GGUFWriter, rope: Rope, head_dim: int) -> None:
    writer.add_rope_dimension_count(rope.rotated(head_dim))
    # Never left out: llama.cpp would take 10000, load, and be silently wrong.
    writer.add_rope_freq_base(rope.theta)
    values = rope.parameters
    if rope.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope.kind))
        writer.add_rope_scaling_factor(values["factor"])
    if rope.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(values["original_max_position_embeddings"]))
    if rope.mscale:
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope.mscale)


def _add_experts(writer: GGUFWriter, model: Architecture, of: Form) -> None:
    moe = next((layer.mlp for layer in model.layers if isinstance(layer.mlp, Moe)), None)
    if moe is None or of.experts is None:
        return
    writer.add_expert_count(len(moe.experts))
    writer.add_expert_used_count(moe.top_k)
    writer.add_expert_feed_forward_length(moe.experts[0].gate.out_features)
    if moe.shared_expert is not None:
        writer.add_expert_shared_feed_forward_length(moe.shared_expert.gate.out_features)
    if of.experts.dense_first is not None:
        writer.add_leading_dense_block_count(sum(not isinstance(layer.mlp, Moe) for layer in model.layers))
    if of.experts.gating is not ExpertGatingFuncType.SOFTMAX:
        writer.add_expert_gating_func(of.experts.gating)
