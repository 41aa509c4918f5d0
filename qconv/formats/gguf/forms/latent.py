"""Latent attention in GGUF: as multi-query attention whose one key head is the latent vector and the rotated part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gguf import Keys

from qconv.checkpoint.config import Config
from qconv.core.architecture import Architecture
from qconv.formats.gguf.changes import Change, latent_keys_and_values
from qconv.formats.gguf.forms.base import Mixing, Values

if TYPE_CHECKING:
    from qconv.formats.gguf.keys import ModelKeys


def _changes(model: Architecture, name: str, shape: tuple[int, ...]) -> Change | None:
    """``kv_b_proj`` becomes two tensors; a head's values are as wide as the architecture's heads."""
    if not name.endswith(".kv_b_proj.weight"):
        return None
    heads, values = model.num_attention_heads, model.head_dim
    return latent_keys_and_values(name, heads, shape[0] // heads - values, values, shape[1])


def _states(config: Values, model: Architecture) -> dict[str, int]:
    """The widths, those before and those after the latent vector is taken apart."""
    values = Config(dict(config))
    rank, rotated = values.integer("kv_lora_rank"), values.integer("qk_rope_head_dim")
    return {
        Keys.Attention.HEAD_COUNT_KV: 1,
        Keys.Attention.KEY_LENGTH: rank + rotated,
        Keys.Attention.VALUE_LENGTH: rank,
        Keys.Attention.KV_LORA_RANK: rank,
        Keys.Attention.KEY_LENGTH_MLA: values.integer("qk_nope_head_dim") + rotated,
        Keys.Attention.VALUE_LENGTH_MLA: values.integer("v_head_dim"),
        Keys.Attention.Q_LORA_RANK: values.integer("q_lora_rank"),
    }


def _differs(config: Values, model: Architecture) -> str | None:
    """llama.cpp takes queries that are not made of a latent vector by the number of layers that V2-Lite has alone."""
    return None if config.get("q_lora_rank") else "no q_lora_rank: queries are made of a latent vector"


def _restores(keys: ModelKeys) -> dict[str, Any]:
    """The widths as config.json has them.

    Raises:
        CheckpointError: they contradict each other, as in files of before 2025, which hold ``attn_kv_b``.
    """
    rank, rotated = keys.integer(Keys.Attention.KV_LORA_RANK), keys.integer(Keys.Rope.DIMENSION_COUNT)
    heads, key = keys.integer(Keys.Attention.HEAD_COUNT), keys.integer(Keys.Attention.KEY_LENGTH_MLA)
    said = [keys.integer(one) for one in (Keys.Attention.HEAD_COUNT_KV, Keys.Attention.KEY_LENGTH)]
    if said != [1, rank + rotated] or keys.integer(Keys.Attention.VALUE_LENGTH) != rank or key <= rotated:
        raise keys.error("its widths are not those of one latent key head")
    return {
        "num_key_value_heads": heads,
        "kv_lora_rank": rank,
        "q_lora_rank": keys.integer(Keys.Attention.Q_LORA_RANK),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": key - rotated,
        "v_head_dim": keys.integer(Keys.Attention.VALUE_LENGTH_MLA),
    }


LATENT = Mixing(latent=True, mscale=True, changes=_changes, states=_states, restores=_restores, differs=_differs)
"""DeepSeek's, with YaRN scaled as theirs is."""
