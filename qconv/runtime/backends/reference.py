"""The backend that every other is held against and falls back to: dequantize one weight, multiply with torch.

It runs on any device. A weight is dense only while it is multiplied with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from qconv.runtime.backends.base import Activation
from qconv.runtime.backends.routing import routed
from qconv.runtime.packed import BlockWeight, DenseWeight, FloatWeight, IntegerWeight, PackedMlp, PackedWeight


def to_device(weight: PackedWeight, device: torch.device) -> PackedWeight:
    """The same weight with its tensors on a device; itself where they are there already."""
    match weight:
        case DenseWeight():
            return replace(weight, weight=weight.weight.to(device))
        case IntegerWeight():
            return replace(weight, parts={name: part.to(device) for name, part in weight.parts.items()})
        case FloatWeight():
            codes, scales = weight.weight.codes.to(device), weight.weight.scales.to(device)
            return replace(weight, weight=replace(weight.weight, codes=codes, scales=scales))
        case BlockWeight():
            return replace(weight, rows=weight.rows.to(device))


@dataclass(frozen=True, slots=True)
class ReferenceLinear:
    """Dequantize to the inputs' dtype, then multiply."""

    weight: PackedWeight

    def __call__(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.weight.dequantize(inputs.dtype))

    def tensors(self) -> Iterator[Tensor]:
        return self.weight.tensors()


@dataclass(frozen=True, slots=True)
class ReferenceExperts:
    """One chosen expert after the other."""

    mlps: Sequence[PackedMlp]
    act: Activation

    def __call__(self, inputs: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return routed(inputs, chosen, weights, len(self.mlps), self._expert)

    def _expert(self, expert: int, inputs: Tensor) -> Tensor:
        mlp, dtype = self.mlps[expert], inputs.dtype
        gate = functional.linear(inputs, mlp.gate.dequantize(dtype))
        up = functional.linear(inputs, mlp.up.dequantize(dtype))
        return functional.linear(self.act(gate) * up, mlp.down.dequantize(dtype))

    def tensors(self) -> Iterator[Tensor]:
        return (tensor for mlp in self.mlps for weight in mlp.weights() for tensor in weight.tensors())


@dataclass(frozen=True, slots=True)
class ReferenceBackend:
    """torch's own operations, on any device."""

    device: torch.device
    name: str = "torch"

    def linear(self, weight: PackedWeight) -> ReferenceLinear:
        """The operator of one linear."""
        return ReferenceLinear(to_device(weight, self.device))

    def experts(self, experts: Sequence[PackedMlp], act: Activation) -> ReferenceExperts:
        """The operator of a sparse block's experts."""
        moved = [PackedMlp(*(to_device(weight, self.device) for weight in mlp.weights())) for mlp in experts]
        return ReferenceExperts(moved, act)


def create(device: torch.device) -> ReferenceBackend:
    """The backend on a device."""
    return ReferenceBackend(device)
