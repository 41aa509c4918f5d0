"""What engines round of a model on disk besides its weights: inputs of linears, and keys and values that they keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qconv.core.architecture import Layer
from qconv.formats.cache import NAMINGS
from qconv.runtime.activations import InputRounding
from qconv.runtime.dequantized import Dequantized
from qconv.runtime.files import DenseFiles, ModelFiles


@dataclass(frozen=True, slots=True)
class CacheRounding:
    """How the keys and values of a layer are rounded, for engines that keep them in FP8.

    Attributes:
        keys: Rounds keys after their rotation, by their stored scale.
        values: Rounds values.
    """

    keys: InputRounding
    values: InputRounding

    def install(self, attention: nn.Module) -> None:
        """Have transformers' attention compute with what it would find in the engine's cache."""
        attention.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return arguments, {**named, "past_key_values": _RoundingCache(self, named.get("past_key_values"))}


class _RoundingCache:
    """A cache of transformers that is given rounded keys and values, or what gives them back where there is none."""

    def __init__(self, rounding: CacheRounding, cache: Any) -> None:
        self._rounding, self._cache = rounding, cache

    def update(self, keys: Tensor, values: Tensor, *rest: Any, **named: Any) -> Any:
        """[sequences, heads, length, head size] each."""
        rounded = self._rounding.keys(keys), self._rounding.values(values)
        return rounded if self._cache is None else self._cache.update(*rounded, *rest, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def cache_rounding(files: ModelFiles, layer: Layer) -> CacheRounding | None:
    """By the scales of a cache that stand beside a layer's attention, whatever format names them; None for none."""
    stored = files.files if isinstance(files, Dequantized) else files
    if not isinstance(stored, DenseFiles):  # GGUF has no place for them
        return None
    entries = stored.checkpoint.entries
    for naming in NAMINGS:
        specs = naming.specs(layer.attention.name, torch.float32)
        found = [entries[spec.name] for spec in specs if spec.name in entries]
        if len(found) == 2 and all(entry.numel == 1 for entry in found):
            return CacheRounding(*(InputRounding(scale=stored.mapped(entry).float().view(())) for entry in found))
    return None


def rounds_inputs(files: ModelFiles) -> bool:
    """Whether engines round the inputs of any linear in the layers, or what they keep of any."""
    layers = files.architecture.layers
    return any(
        cache_rounding(files, layer) is not None
        or any(files.input_rounding(linear) is not None for linear in layer.linears())
        for layer in layers
    )
