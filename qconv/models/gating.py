"""What experts make of the outputs of gate and up: mostly ``act(gate) * up``, in some models with limits, offsets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]


class Gating(Protocol):
    """down's input from the outputs of gate and up."""

    @property
    def activation(self) -> Activation | None:
        """The activation, where it is ``activation(gate) * up`` and no more; else None."""

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """[tokens, inner] from [tokens, inner] each."""


@dataclass(frozen=True, slots=True)
class Plain:
    """``activation(gate) * up``."""

    activation: Activation

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        activated = self.activation(gate)
        return activated * up if torch.is_grad_enabled() else activated.mul_(up)


@dataclass(frozen=True, slots=True)
class Own:
    """What transformers' module of the experts computes.

    Attributes:
        module: It, of which the weights are not looked at.
        interleaved: Whether it takes gate and up by turns, and not gate before up.
    """

    module: Any
    interleaved: bool
    activation: Activation | None = None

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        joined = torch.stack([gate, up], -1).flatten(-2) if self.interleaved else torch.cat([gate, up], -1)
        made: Tensor = self.module._apply_gate(joined)
        return made


def gating_of(experts: nn.Module, interleaved: bool) -> Gating:
    """That of transformers' experts.

    Args:
        experts: The module that holds them together.
        interleaved: Whether it holds gate and up by turns.

    Raises:
        AttributeError: it has no gate of a kind that is known.
    """
    untyped: Any = experts
    gates = getattr(type(experts), "_apply_gate", None)
    if gates is None or gates.__name__ == "_default_apply_gate":
        return Plain(untyped.act_fn)
    return Own(experts, interleaved)


def takes_turns(gating: Own) -> bool:
    """Whether the first number that a module gives depends on the first two that it takes: gate and up by turns."""
    joined = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    changed = joined.clone()
    changed[0, 1] += 1.0
    apply: Callable[[Tensor], Tensor] = gating.module._apply_gate
    return bool(apply(joined.clone())[0, 0] != apply(changed)[0, 0])


def is_linear_in_up(gating: Gating) -> bool:
    """Whether scales fold from down into up: what doubles up's outputs doubles down's input."""
    generator = torch.Generator().manual_seed(0)
    gate, up = (8.0 * torch.randn(64, 8, generator=generator) for _ in range(2))
    once = gating(gate.clone(), up.clone())
    return bool(torch.allclose(gating(gate.clone(), 2.0 * up), 2.0 * once, rtol=1e-5, atol=1e-6))
