"""Tensors of a checkpoint that transformers' model of its type leaves out by its own word: copied, never computed with.

A class lists the names in ``_keys_to_ignore_on_load_unexpected``: layers that predict further tokens (MTP), vision and
audio towers beside a language model. So is what the class of a larger model has beside its language model. What no
class lists is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qconv.core.architecture import Architecture
from qconv.errors import CheckpointError
from qconv.models.discovery.nested import beside
from qconv.models.discovery.structure import read_config

MTP, OTHER = "MTP", "other"
_NUMBERED = re.compile(r"layers\\?\.(\d+)")
"""In a pattern: the layer of a published model, which is the one behind the layers of the model at hand."""
_PARTS = (
    (MTP, re.compile(r"(^|[._])(mtp|nextn)([._]|$)")),
    ("vision tower", re.compile(r"(^|[._])(visual|vision|image)([._]|$)")),
    ("audio tower", re.compile(r"(^|[._])(audio|speech|talker|code2wav|token2wav)([._]|$)")),
)
"""What parts are called, by their tensors' names."""


def left_out(values: Mapping[str, Any], model: Architecture, names: Iterable[str]) -> dict[str, str]:
    """Those of ``names`` that are left out, each with the part that it belongs to, such as ``MTP``.

    Args:
        values: config.json.
        model: The model that it describes.
        names: Tensors of the checkpoint that are none of the model's.
    """
    unknown = list(names)
    if not unknown:
        return {}
    said = _Said.of(values, model)
    found = {name: None if said is None else said.part(name) for name in unknown}
    missing = [name for name, part in found.items() if part is None]
    others = _beside(values) if missing else frozenset()
    found |= {name: _part(name) for name in missing if name in others}
    return {name: part for name, part in found.items() if part is not None}


def _beside(values: Mapping[str, Any]) -> frozenset[str]:
    try:
        return beside(values)
    except CheckpointError:
        return frozenset()


@dataclass(frozen=True, slots=True)
class _Said:
    """What a class says.

    Attributes:
        patterns: Each with the number of the layer that it names, if it names one.
        layers: What the names of a model's layers begin with, ``model.layers.``.
        count: How many layers the model has: none of them is left out.
        further: How many layers behind them the config counts, that predict further tokens.
    """

    patterns: tuple[tuple[re.Pattern[str], int | None], ...]
    layers: str
    count: int
    further: int

    @classmethod
    def of(cls, values: Mapping[str, Any], model: Architecture) -> _Said | None:
        """None if it says nothing, or there is no class."""
        from transformers import AutoModelForCausalLM

        untyped: Any = AutoModelForCausalLM
        try:
            config = read_config(values)
        except CheckpointError:
            return None
        with torch.device("meta"):
            said = getattr(untyped.from_config(config), "_keys_to_ignore_on_load_unexpected", None)
        patterns = [(re.compile(one), _NUMBERED.search(one)) for one in sorted(said or ())]
        if not patterns:
            return None
        first = model.layers[0]
        further = getattr(config, "num_nextn_predict_layers", None)
        return cls(
            tuple((pattern, None if named is None else int(named[1])) for pattern, named in patterns),
            first.name.removesuffix(str(first.index)),
            len(model.layers),
            further if isinstance(further, int) else 0,
        )

    def part(self, name: str) -> str | None:
        """The part that a tensor belongs to; None if it is not left out."""
        for pattern, named in self.patterns:
            if named is None and pattern.search(name):
                return _part(name)
            if named is not None and self._is_behind(name, named):
                return MTP
        return None

    def _is_behind(self, name: str, named: int) -> bool:
        """Whether a tensor lies in a layer behind the model's: in the named one, or in as many as are counted."""
        number = self._layer(name)
        return number is not None and self.count <= number and (number == named or number < self.count + self.further)

    def _layer(self, name: str) -> int | None:
        """The number of the layer that a tensor lies in, if it is called as a layer's is."""
        number = name.removeprefix(self.layers).partition(".")[0]
        return int(number) if name.startswith(self.layers) and number.isascii() and number.isdigit() else None


def _part(name: str) -> str:
    return next((part for part, pattern in _PARTS if pattern.search(name)), OTHER)
