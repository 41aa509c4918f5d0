"""transformers' own model of a config.json, built without weights on the meta device, where it costs nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from qconv.boundary.printable import name_of, one_line
from qconv.checkpoint.config import language_part
from qconv.errors import CheckpointError

_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
ALIASES = {"kimi_k2": "deepseek_v3"}
"""Model types that are another one under a new name."""


def text_part(values: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes the language model: itself, or its ``text_config``.

    Raises:
        CheckpointError: it names no model type.
    """
    own = language_part(values)
    if not isinstance(own.get("model_type"), str):
        raise CheckpointError("config.json has no model_type.", hint="Is this a Hugging Face checkpoint?")
    return own


def config_of(values: Mapping[str, Any]) -> Any:
    """transformers' config of the language model.

    Raises:
        CheckpointError: transformers knows no such model type, or does not accept the config.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    own = text_part(values)
    named = own.pop("model_type")
    model_type = ALIASES.get(named, named)
    if model_type not in KNOWN:
        raise CheckpointError(
            f"config.json: unknown architecture: model_type {name_of(model_type)!r}, which transformers lacks too.",
            hint=f"Code that comes with a checkpoint is never run: declare the family in qconv/models/{model_type}.py."
            if model_type.isidentifier()
            else "Repair config.json.",
        )
    try:
        return AutoConfig.for_model(model_type, **{key: _floats_restored(value) for key, value in own.items()})
    # Its checks raise a kind of their own, its code whatever a value of another type makes it raise.
    except Exception as error:
        raise CheckpointError(
            f"config.json: transformers does not accept it: {one_line(error)}.", hint="Repair config.json."
        ) from error


def _floats_restored(value: Any) -> Any:
    """A setting with numbers where transformers writes ``{"__float__": "Infinity"}``, since JSON has no infinities."""
    if isinstance(value, Mapping):
        number = _FLOATS.get(value["__float__"]) if [*value] == ["__float__"] else None
        return {key: _floats_restored(one) for key, one in value.items()} if number is None else number
    return [_floats_restored(one) for one in value] if isinstance(value, list) else value


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """The model for causal language modelling on the meta device, but for its rotary frequencies.

    Args:
        config: See :func:`config_of`.
        dtype: Of its tensors.

    Raises:
        CheckpointError: transformers does not accept the config.
    """
    from transformers import AutoModelForCausalLM

    untyped: Any = AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model = untyped.from_config(config, dtype=dtype)
        inner: Any = getattr(model, "model", None)
        if getattr(inner, "rotary_emb", None) is not None:
            # Frequencies are computed, not loaded, so that module is built again off the meta device.
            inner.rotary_emb = type(inner.rotary_emb)(config)
    # Its checks raise a kind of their own, its modules whatever a value of another type makes them raise.
    except Exception as error:
        raise CheckpointError(
            f"config.json: transformers does not accept it: {one_line(error)}.", hint="Repair config.json."
        ) from error
    return model.eval().requires_grad_(False)
