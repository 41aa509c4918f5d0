"""Model architectures as data: one short declarative file a family; the file's name is the config's ``model_type``.

A family says what its modules are called and which keys of config.json decide about biases, norms and experts
(``base``); :func:`architecture` makes of that and a config.json the linears, norms and experts of every layer
(:mod:`qconv.core.architecture`), which is all that the rest of qconv sees of a model. ``folding`` is what scales folded
into the operation before a linear do to the tensors around it. ``discovery`` reads a structure off transformers' model
(``transformer``), and ``calls`` is how that calls its parts, and
``gating`` what its experts make of gate and up.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from qconv.boundary.printable import name_of
from qconv.core.architecture import Architecture
from qconv.errors import CheckpointError
from qconv.models.base import Family, build

_SHARED = ("base", "calls", "discovery", "folding", "gating", "transformer")
"""Modules here that are no family."""


def families() -> list[str]:
    """The ``model_type`` of every family that qconv knows, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED)


def family(model_type: str) -> Family:
    """The family of that name.

    Raises:
        CheckpointError: no such family.
    """
    if model_type not in families():
        raise CheckpointError(
            f"config.json: unknown architecture: model_type {name_of(model_type)!r}.",
            hint=f"qconv knows {', '.join(families())}; a new family is one file in qconv/models/.",
        )
    declared: Family = importlib.import_module(f"{__name__}.{model_type}").FAMILY
    return declared


def architecture(config: dict[str, Any]) -> Architecture:
    """The resolved architecture of a checkpoint's config.json; of a type without a family file a discovered one.

    Raises:
        CheckpointError: transformers has no such model type either, or its layers are of a kind that qconv does not
            work on; a key of config.json is missing or of the wrong type.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError("config.json has no model_type.", hint="Is this a Hugging Face checkpoint?")
    if model_type not in families():
        from qconv.models.discovery.fitting import fitted

        return fitted(config)
    return build(family(model_type), config)


def is_known(config: dict[str, Any]) -> bool:
    """Whether a config.json's model type is declared, or discovered to be of a kind that qconv works on."""
    if config.get("model_type") in families():
        return True
    try:
        architecture(config)
    except CheckpointError:
        return False
    return True


__all__ = ["Architecture", "Family", "architecture", "families", "family", "is_known"]
