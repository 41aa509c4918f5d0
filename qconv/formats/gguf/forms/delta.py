"""Gated delta rules in GGUF: a state space's keys, and its tensors as llama.cpp computes with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gguf import Keys

from qconv.checkpoint.config import Config
from qconv.core.architecture import Architecture
from qconv.formats.gguf.changes import Change, added, decay, renamed
from qconv.formats.gguf.forms.base import Mixing, Values

if TYPE_CHECKING:
    from qconv.formats.gguf.keys import ModelKeys

_STATED = {
    Keys.SSM.CONV_KERNEL: ("linear_conv_kernel_dim", 4),
    Keys.SSM.STATE_SIZE: ("linear_key_head_dim", 128),
    Keys.SSM.GROUP_COUNT: ("linear_num_key_heads", 16),
    Keys.SSM.TIME_STEP_RANK: ("linear_num_value_heads", 32),
}
_VALUES = ("linear_value_head_dim", 128)


def _changes(model: Architecture, name: str, shape: tuple[int, ...]) -> Change | None:
    stem, _, leaf = name.rpartition("linear_attn.")
    if name.endswith(("self_attn.q_norm.weight", "self_attn.k_norm.weight", "model.norm.weight")):
        return added(name, shape, 1.0)
    if leaf == "conv1d.weight":
        return renamed(name, (shape[0], shape[-1]))
    if leaf == "A_log":
        return decay(name, shape)
    return renamed(f"{stem}linear_attn.dt_proj.bias", shape) if leaf == "dt_bias" else None


def _states(config: Values, model: Architecture) -> dict[str, int]:
    values = Config(dict(config))
    stated = {key: values.integer(name, default=default) for key, (name, default) in _STATED.items()}
    heads = stated[Keys.SSM.TIME_STEP_RANK]
    inner = heads * values.integer(_VALUES[0], default=_VALUES[1])
    return stated | {Keys.SSM.INNER_SIZE: inner, Keys.LLM.FULL_ATTENTION_INTERVAL: _interval(config)}


def _restores(keys: ModelKeys) -> dict[str, Any]:
    config: dict[str, Any] = {name: keys.integer(key) for key, (name, _) in _STATED.items()}
    config[_VALUES[0]] = config["linear_key_head_dim"]
    inner, heads = keys.integer(Keys.SSM.INNER_SIZE), config["linear_num_value_heads"]
    if inner != heads * config[_VALUES[0]]:
        raise keys.error(f"{Keys.SSM.INNER_SIZE} is {inner}, not {heads} heads of {config[_VALUES[0]]}")
    interval = keys.integer(Keys.LLM.FULL_ATTENTION_INTERVAL, 4)
    return config | {"layer_types": _kinds(keys.integer(Keys.LLM.BLOCK_COUNT), interval)}


def _differs(config: Values, model: Architecture) -> str | None:
    kinds = config.get("layer_types")
    if kinds and kinds != _kinds(len(model.layers), _interval(config)):
        return "layer_types: full attention comes at equal distances"
    widths = [config.get(name, default) for name, default in (_STATED[Keys.SSM.STATE_SIZE], _VALUES)]
    return None if widths[0] == widths[1] else f"heads of {widths[0]} and {widths[1]}: keys are as wide as values"


def _interval(config: Values) -> int:
    kinds = config.get("layer_types") or []
    return kinds.index("full_attention") + 1 if "full_attention" in kinds else 4


def _kinds(layers: int, interval: int) -> list[str]:
    return ["linear_attention" if (layer + 1) % interval else "full_attention" for layer in range(layers)]


DELTA = Mixing(changes=_changes, states=_states, restores=_restores, differs=_differs)
"""Qwen3-Next's."""
