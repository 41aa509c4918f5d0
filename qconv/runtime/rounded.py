"""Experts that kernels have no place for: with rounded inputs, as engines round for FP8, with biases, other gates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from qconv.models.gating import Gating
from qconv.runtime.activations import InputRounding
from qconv.runtime.backends.base import LinearOperator
from qconv.runtime.backends.routing import routed


@dataclass(frozen=True, slots=True)
class RoundedLinear:
    """A linear that rounds its inputs first, and takes them as they are where it has no rounding; with its bias."""

    operator: LinearOperator
    rounding: InputRounding | None
    bias: Tensor | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        output = self.operator(inputs if self.rounding is None else self.rounding(inputs))
        return output if self.bias is None else output + self.bias.to(output.dtype)

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
    gating: Gating

    def __call__(self, inputs: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return routed(inputs, chosen, weights, len(self.mlps), self._expert)

    def _expert(self, expert: int, inputs: Tensor) -> Tensor:
        mlp = self.mlps[expert]
        return mlp.down(self.gating(mlp.gate(inputs), mlp.up(inputs)))

    def tensors(self) -> Iterator[Tensor]:
        return (tensor for mlp in self.mlps for tensor in mlp.tensors())
