"""Gated delta rules in GGUF: a state space's keys, and its tensors as llama.cpp computes with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from gguf import Keys

from qconv.checkpoint.config import Config
from qconv.core.architecture import Architecture, Norm, Parameter
from qconv.formats.gguf.changes import (
    Change,
    added,
    decay,
    moved_columns,
    moved_rows,
    renamed,
    split_rows,
    with_rows_moved,
)
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


def _split(model: Architecture, name: str, shape: tuple[int, ...]) -> Change | None:
    """llama.cpp's own converter takes q, k and v of all heads out of ``in_proj_qkvz``, which has them by key head."""
    if not name.endswith("in_proj_qkvz.weight"):
        return None
    size, heads = _heads(model)
    values = heads * size
    keys = (shape[0] - 2 * values) // (2 * size)
    by_head = torch.arange(shape[0]).view(keys, -1)
    q, k, v, z = torch.tensor_split(by_head, (size, 2 * size, 2 * size + values // keys), dim=1)
    stem = name.removesuffix("in_proj_qkvz.weight")
    joined = torch.cat([q.flatten(), k.flatten(), v.flatten()])
    return split_rows({f"{stem}in_proj_qkv.weight": joined, f"{stem}in_proj_z.weight": z.flatten()}, shape[1])


def _tiled_changes(model: Architecture, name: str, shape: tuple[int, ...]) -> Change | None:
    """As :func:`_changes`, with heads of values in the order in which llama.cpp repeats those of keys.

    transformers has the heads of values that share a key head beside each other; llama.cpp first has one of each.
    """
    change, leaf = _changes(model, name, shape), name.rpartition("linear_attn.")[2]
    if leaf == name or leaf == "norm.weight":
        return change
    size, heads = _heads(model)
    values, first = heads * size, shape[0] - heads * size
    keys = _key_heads(model, size, values)
    order = torch.arange(values).view(keys, heads // keys, size).transpose(0, 1).flatten()
    if leaf == "out_proj.weight":
        return moved_columns(name, shape, order)
    if leaf in ("in_proj_qkv.weight", "conv1d.weight"):
        order = torch.cat([torch.arange(first), order + first])
    elif leaf != "in_proj_z.weight":
        order = torch.arange(heads).view(keys, heads // keys).T.flatten()
    return moved_rows(name, shape, order) if change is None else with_rows_moved(change, order)


def _heads(model: Architecture) -> tuple[int, int]:
    """The size of a head and the number of those of values."""
    kept = next(layer.attention.kept() for layer in model.layers if layer.attention.name.endswith("linear_attn"))
    size = next(one.size for one in kept if isinstance(one, Norm))
    return size, next(one.shape[0] for one in kept if isinstance(one, Parameter) and one.name.endswith("A_log"))


def _key_heads(model: Architecture, size: int, values: int) -> int:
    linears = (linear for layer in model.layers for linear in layer.attention.linears())
    joined = next(linear.out_features for linear in linears if linear.name.endswith("in_proj_qkv"))
    return (joined - values) // (2 * size)


def _sectioned_states(config: Values, model: Architecture) -> dict[str, int | list[int]]:
    """As :func:`_states`, with the sections of rotary dimensions, which of text all have one position."""
    rope = config.get("rope_parameters") or {}
    sections = rope.get("mrope_section") or [11, 11, 10]
    return {**_states(config, model), Keys.Rope.DIMENSION_SECTIONS: [*sections, 0]}


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
    layers = keys.integer(Keys.LLM.BLOCK_COUNT) - keys.integer(Keys.LLM.NEXTN_PREDICT_LAYERS, 0)
    return config | {"layer_types": _kinds(layers, interval)}


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


DELTA = Mixing(changes=_changes, elsewhere=_split, states=_states, restores=_restores, differs=_differs)
"""Qwen3-Next's."""
TILED_DELTA = Mixing(changes=_tiled_changes, states=_sectioned_states, restores=_restores, differs=_differs)
"""Qwen3.5's."""
