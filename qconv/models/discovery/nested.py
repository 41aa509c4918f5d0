"""A language model within a larger one: what its tensors are called in the checkpoint of the whole.

A config.json with a ``text_config`` describes a model of several parts. transformers has the language model also by
itself, under names without a prefix; where it lies in the whole says which prefix the checkpoint has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import nn

from qconv.core.architecture import EMBEDDING, HEAD, Architecture
from qconv.models.transformer import config_of, text_part

_INNER = "model."


def in_whole(values: Mapping[str, Any], model: nn.Module, found: Architecture) -> Architecture:
    """The architecture with the names that a checkpoint has for it; as it is where the model is a whole by itself.

    Args:
        values: config.json.
        model: The language model by itself, on the meta device.
        found: Its architecture.
    """
    whole = _Whole.of(values, type(model.get_submodule(_INNER.removesuffix("."))))
    if whole is None or whole.prefixes == ((_INNER, _INNER), (HEAD, HEAD)):
        return found

    def stored(name: str) -> str:
        for own, held in whole.prefixes:
            if name == held or name.startswith(held if held.endswith(".") else f"{held}."):
                return own + name.removeprefix(held)
        return name

    named: Architecture = _renamed(found, stored)
    return replace(named, held={stored(name): held for name, held in found.held.items()}, prefixes=whole.prefixes)


def beside(values: Mapping[str, Any]) -> frozenset[str]:
    """The tensors of a larger model that do not belong to its language model; empty where that is a whole by itself."""
    from transformers import AutoModelForCausalLM

    untyped: Any = AutoModelForCausalLM
    if not _is_part(values):
        return frozenset()
    with torch.device("meta"):
        model: nn.Module = untyped.from_config(config_of(values))
    whole = _Whole.of(values, type(model.get_submodule(_INNER.removesuffix("."))))
    return frozenset() if whole is None else whole.others


@dataclass(frozen=True, slots=True)
class _Whole:
    """A model of several parts.

    Attributes:
        prefixes: What names begin with in the checkpoint, and in the language model by itself: within it, and of its
            head.
        others: The checkpoint's tensors outside the language model.
    """

    prefixes: tuple[tuple[str, str], tuple[str, str]]
    others: frozenset[str]

    @classmethod
    def of(cls, values: Mapping[str, Any], inner: type[nn.Module]) -> _Whole | None:
        """None where the language model is a whole by itself, or transformers does not have the whole.

        Args:
            values: config.json.
            inner: The class of the language model without its head.
        """
        from transformers import AutoConfig, AutoModelForImageTextToText
        from transformers.core_model_loading import revert_weight_conversion

        if not _is_part(values):
            return None
        untyped: Any = AutoModelForImageTextToText
        try:
            with torch.device("meta"):
                made: Any = untyped.from_config(AutoConfig.for_model(**values), dtype=torch.bfloat16)
        # Whatever transformers raises on a type that it does not have as a whole: nothing is known of it then.
        except Exception:
            return None
        state = made.state_dict()
        leaf = f"{EMBEDDING.removeprefix(_INNER)}.weight"
        places = [name for name, module in made.named_modules() if type(module) is inner and f"{name}.{leaf}" in state]
        if not places:
            return None
        at = places[0]
        heads = [name for name in state if name == f"{HEAD}.weight" or name.endswith(f".{HEAD}.weight")]

        def stored(names: Iterable[str]) -> list[str]:
            return list(revert_weight_conversion(made, {name: state[name] for name in names}))

        (embedding,) = stored([f"{at}.{leaf}"])
        head = stored(heads[:1])[0].removesuffix(".weight") if heads else HEAD
        others = stored(name for name in state if name not in heads and not name.startswith(f"{at}."))
        return cls(((embedding.removesuffix(leaf), _INNER), (head, HEAD)), frozenset(others))


def _is_part(values: Mapping[str, Any]) -> bool:
    return text_part(values).keys() != values.keys()


def _renamed(part: Any, stored: Callable[[str], str]) -> Any:
    """A description with other names in all of its parts."""
    if isinstance(part, str):
        return stored(part)
    if isinstance(part, tuple):
        return tuple(_renamed(one, stored) for one in part)
    if is_dataclass(part) and not isinstance(part, type):
        changed = {one.name: _renamed(getattr(part, one.name), stored) for one in fields(part) if one.name != "held"}
        return replace(part, **changed)
    return part
