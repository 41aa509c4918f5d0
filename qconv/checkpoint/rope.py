"""Rotary embeddings as a config.json states them: as transformers 5 spells them, as older readers do, or both."""

from __future__ import annotations

from typing import Any

from qconv.errors import CheckpointError, UsageError

NEW, OLD, THETA = "rope_parameters", "rope_scaling", "rope_theta"
_PARTIAL = "partial_rotary_factor"
_FROM_LENGTH = ("yarn", "llama3", "longrope")
"""The types whose original context length is the model's where the parameters do not say it."""


def stated_rope(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers 5 computes with, by the names of ``rope_parameters``: ``rope_type``, the base, the scaling.

    ``rope_scaling`` holds where it says anything, as model cards tell people to add it; else ``rope_parameters``. The
    base is the one stated there, else ``rope_theta``; it is left out where config.json leaves it to the family. (Read
    in transformers 5.23, ``convert_rope_params_to_dict`` and ``standardize_rope_params``, and run.)

    Raises:
        CheckpointError: parameters that are no object, or one for each kind of layer; a type that is no name.
        UsageError: ``rope_scaling`` holds and would lose the base that ``rope_parameters`` names.
    """
    new, old = _parameters(config, NEW), _parameters(config, OLD)
    found = dict(old or new)
    theta = config.get(THETA)
    if old and THETA not in old and theta is None and THETA in new:
        raise UsageError(
            f"config.json: {OLD} holds over {NEW}, and with it the {THETA} {new[THETA]!r} of {NEW} is lost.",
            hint=f"Put {THETA} beside {OLD}, or write the scaling into {NEW} and remove {OLD}.",
        )
    if theta is not None:
        found.setdefault(THETA, theta)
    if config.get(_PARTIAL) is not None:
        found.setdefault(_PARTIAL, config[_PARTIAL])
    found["rope_type"] = found.get("rope_type", found.pop("type", "default"))
    found.pop("type", None)
    if not isinstance(found["rope_type"], str):
        raise CheckpointError(f"config.json: rope_type {found['rope_type']!r} is no name.", hint="Repair config.json.")
    if found["rope_type"] in _FROM_LENGTH and config.get("max_position_embeddings") is not None:
        found.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return found


def in_both_spellings(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of a config.json that make readers before and after transformers 5 compute the same.

    transformers 5 moved ``rope_theta`` into ``rope_parameters`` and ``rope_scaling`` with it; what still runs
    transformers 4 knows the old names alone, and computes without a scaling that it does not find. Where both are there
    and differ, both become what transformers 5 computes with. Empty for a config in the old spelling, which both read.

    Raises:
        CheckpointError, UsageError: as :func:`stated_rope`.
    """
    if not isinstance(config.get(NEW), dict) or _is_nested(config[NEW]):
        return {}
    rope = stated_rope(config)
    keys: dict[str, Any] = {name: rope[name] for name in (THETA, _PARTIAL) if name in rope}
    if rope["rope_type"] != "default":
        keys[OLD] = {name: value for name, value in rope.items() if name not in (THETA, _PARTIAL)}
    if config.get(OLD):
        keys[NEW] = rope
    return keys


def _parameters(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"config.json: {key} {value!r} is not an object.", hint="Repair config.json.")
    if _is_nested(value):
        raise CheckpointError(
            f"config.json: {key} has parameters for each kind of layer ({', '.join(sorted(value))}).",
            hint="The architectures that qconv knows have one for all layers.",
        )
    return value


def _is_nested(value: dict[str, Any]) -> bool:
    return any(isinstance(one, dict) for one in value.values())
