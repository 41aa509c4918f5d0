"""Experts whose inputs are rounded before they are multiplied with, as engines do with FP8 activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from qconv.runtime.activations import InputRounding
from qconv.runtime.backends.base import Activation, LinearOperator
from qconv.runtime.backends.routing import routed


@dataclass(frozen=True, slots=True)
class RoundedLinear:
    """A linear that rounds its inputs first; as they are where it has no rounding."""

    operator: LinearOperator
    rounding: InputRounding | None

    def __call__(self, inputs: Tensor) -> Tensor:
        return self.operator(inputs if self.rounding is None else self.rounding(inputs))

    def tensors(self) -> Iterator[Tensor]:
        return self.operator.tensors()


@dataclass(frozen=True, slots=True)
class RoundedMlp:
    """An expert's gate, up and down."""

    gate: RoundedLinear
    up: RoundedLinear
    down: RoundedLinear

    def tensors(self) -> Iterator[Tensor]:
        """What the three keep in memory."""
        for linear in (self.gate, self.up, self.down):
            yield from linear.tensors()


@dataclass(frozen=True, slots=True)
class RoundedExperts:
    """One chosen expert after the other."""

    mlps: Sequence[RoundedMlp]
    act: Activation

    def __call__(self, inputs: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return routed(inputs, chosen, weights, len(self.mlps), self._expert)

    def _expert(self, expert: int, inputs: Tensor) -> Tensor:
        mlp = self.mlps[expert]
        return mlp.down(self.act(mlp.gate(inputs)) * mlp.up(inputs))

    def tensors(self) -> Iterator[Tensor]:
        return (tensor for mlp in self.mlps for tensor in mlp.tensors())
