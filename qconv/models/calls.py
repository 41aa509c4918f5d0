"""With what transformers' model calls the mixer of a layer: masks, rotary embeddings and whatever else a model has.

The model's own code between its embedding and its layers is run on stand-ins, and so is a layer's up to its mixer.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_LENGTHS = 2
"""Lengths of sequences whose calls are kept: masks of long ones are large."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a module is called with, but for its input.

    Attributes:
        before: Positional arguments; the input goes first where it is no named one.
        named: Named ones.
        name: The input's name; None where it is positional.
    """

    before: tuple[Any, ...]
    named: Mapping[str, Any]
    name: str | None

    @classmethod
    def of(cls, positional: tuple[Any, ...], named: Mapping[str, Any], given: Tensor) -> Call:
        """A call that was seen, in which ``given`` was the input.

        Raises:
            ValueError: it was not.
        """
        others = {key: value for key, value in named.items() if value is not given}
        if len(others) < len(named):
            return cls(positional, others, next(key for key, value in named.items() if value is given))
        if not positional or positional[0] is not given:
            raise ValueError("the mixer does not read what the norm before it gives")
        return cls(positional[1:], others, None)

    def __call__(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """The module's output, or the first of several, of the input's shape.

        Args:
            module: What is called.
            inputs: Its input, [sequences, length, hidden].
        """
        if self.name is None:
            output: Any = module(inputs, *self.before, **self.named)
        else:
            output = module(*self.before, **self.named, **{self.name: inputs})
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found


@dataclass(slots=True)
class Calls:
    """The calls of one model's mixers; threads may share it.

    Attributes:
        model: transformers' model without its head, on the meta device but for rotary frequencies.
        hidden: The width of what runs through the layers.
    """

    model: Any
    hidden: int
    _known: OrderedDict[tuple[Any, ...], list[tuple[Any, ...]]] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def mixer(self, layer: int, name: str, like: Tensor) -> Call:
        """What a layer calls its mixer with.

        Args:
            layer: Its index.
            name: The mixer's name within it.
            like: The mixer's input: its length, dtype and device count.

        Raises:
            ValueError: the mixer does not read what the norm before it gives.
        """
        hidden = torch.empty(1, like.shape[1], self.hidden, dtype=like.dtype, device=like.device)
        positional, named = self.layer(layer, hidden)
        return _of_mixer(self.model.layers[layer], name, hidden, positional, named)

    def layer(self, index: int, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model calls a layer with beside its input, [1, length, hidden], which is overwritten."""
        with self._lock, torch.no_grad():
            positional, named = self._of_layers(hidden)[index]
            return positional, named

    def _of_layers(self, hidden: Tensor) -> list[tuple[Any, ...]]:
        """What the model calls its layers with beside their input."""
        key = hidden.shape[1], hidden.dtype, hidden.device
        if key not in self._known:
            hidden.zero_()
            try:
                self._known[key] = self._noted(hidden, ())
            except ValueError:
                # Some models take two things from a layer: GLM-5 hands on which keys were chosen.
                self._known[key] = self._noted(hidden, (_HandedOn(),))
            while len(self._known) > _LENGTHS:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def _noted(self, hidden: Tensor, beside: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """What layers are called with that give ``hidden`` and what is ``beside`` it."""
        seen: list[tuple[Any, ...]] = []
        layers = nn.ModuleList([_noting(layer, seen, beside) for layer in self.model.layers])
        around = {"layers": layers, final_norm_of(self.model): _Same()}
        with_children(self.model, around)(inputs_embeds=hidden, use_cache=False)
        return seen


def final_norm_of(model: nn.Module) -> str:
    """What the norm after the last layer is called in transformers' model without its head."""
    names = [name for name, _ in model.named_children() if name.endswith("norm")]
    return names[-1] if names else "norm"


def with_children(module: Any, children: Mapping[str, nn.Module]) -> Any:
    """The same module with some other children; its tensors and the rest are shared."""
    changed = copy.copy(module)
    changed.__dict__ = {**module.__dict__, "_modules": {**module._modules, **children}}
    return changed


class _Same(nn.Module):
    """Gives what it gets."""

    def forward(self, inputs: Tensor, *_: Any, **__: Any) -> Tensor:
        return inputs


class _HandedOn:
    """What a layer gives the next one beside its output; none of the layers that are run one by one may look at it."""

    def __bool__(self) -> bool:
        raise ValueError("a layer uses more of the layer before it than its output")


class _Seen(Exception):
    """A mixer was called."""

    def __init__(self, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        super().__init__()
        self.positional, self.named = positional, named


class _Raising(nn.Module):
    """In the place of a mixer."""

    def forward(self, *positional: Any, **named: Any) -> None:
        raise _Seen(positional, named)


def _noting(layer: nn.Module, seen: list[tuple[Any, ...]], beside: tuple[Any, ...]) -> nn.Module:
    """A layer that gives back its input, and ``beside`` it what there is, and notes what else it was called with."""

    def forward(hidden: Tensor, *positional: Any, **named: Any) -> Any:
        seen.append((positional, named))
        return (hidden, *beside) if beside else hidden

    noting: nn.Module = with_children(layer, {})
    noting.__dict__["forward"] = forward
    return noting


def _of_mixer(layer: nn.Module, name: str, hidden: Tensor, positional: Any, named: Any) -> Call:
    children: dict[str, nn.Module] = {child: _Same() for child, _ in layer.named_children()}
    stopped = with_children(layer, {**children, name: _Raising()})
    try:
        stopped(hidden, *positional, **named)
    except _Seen as seen:
        return Call.of(seen.positional, seen.named, hidden)
    raise ValueError("a layer does not call its mixer")
