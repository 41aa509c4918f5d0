"""Llama 4's attention in GGUF: chunks of 8192 tokens, every fourth layer of all tokens, and q and k that are normed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gguf import Keys

from qconv.checkpoint.config import Config
from qconv.core.architecture import Architecture, Moe
from qconv.formats.gguf.forms.base import Fixed, Mixing, Values, Windows, sliding_layers, without_rotation

if TYPE_CHECKING:
    from qconv.formats.gguf.keys import ModelKeys

_NOT_NORMED = 128  # experts: llama.cpp tells Maverick, which has no such norms, by their number


def _states(config: Values, model: Architecture) -> dict[str, int]:
    """The width of dense layers, which config.json calls otherwise than other families do."""
    return {Keys.LLM.FEED_FORWARD_LENGTH: Config(dict(config)).integer("intermediate_size_mlp", default=16384)}


def _restores(keys: ModelKeys) -> dict[str, Any]:
    return {
        "intermediate_size_mlp": keys.integer(Keys.LLM.FEED_FORWARD_LENGTH),
        "use_qk_norm": keys.integer(Keys.LLM.EXPERT_COUNT) != _NOT_NORMED,
    }


def _differs(config: Values, model: Architecture) -> str | None:
    count = next((len(layer.mlp.experts) for layer in model.layers if isinstance(layer.mlp, Moe)), 0)
    if not count:
        return "no layer has experts: some have"
    if bool(config.get("use_qk_norm", True)) == (count == _NOT_NORMED):
        return f"use_qk_norm {config.get('use_qk_norm', True)!r}: q and k are normed unless there are 128 experts"
    return without_rotation(config, model)


CHUNKS = Windows(sliding_layers, period=4, size="attention_chunk_size", kind="chunked_attention", only=8192)
"""Its windows, which do not slide."""
TEMPERATURE = (
    Fixed("attn_temperature_tuning", True, "queries that are not rotated are scaled by their position", True),
    Fixed("floor_scale", 8192, "the scale rises each 8192 tokens", 8192),
    Fixed("attn_scale", 0.1, "the scale is one and a tenth of a logarithm", 0.1),
)
"""How queries are scaled far into a text."""
CHUNKED = Mixing(states=_states, restores=_restores, differs=_differs)
"""What else its attention and its dense layers have."""
