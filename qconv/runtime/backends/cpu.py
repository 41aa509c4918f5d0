"""The backend of machines without a GPU: C++ on the packed weights, or torch where there is no compiler.

Few tokens are multiplied with the packed weight itself, which reads a quarter of what a dense one takes. For more a
weight is made dense, one at a time, and multiplied by torch's own operation, which has the processor's matrix units.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qconv.runtime.backends.base import Activation, Backend, ExpertsOperator, LinearOperator
from qconv.runtime.backends.compiled import Compiled, CompiledExperts, CompiledWeight, describe
from qconv.runtime.backends.reference import ReferenceBackend, ReferenceLinear
from qconv.runtime.backends.routing import routed
from qconv.runtime.packed import PackedMlp, PackedWeight

FEW_TOKENS = 4
"""Up to so many rows the packed product is sooner done than the dense weight is made."""

_SILU = ("SiLU", "SiLUActivation")


def dense(library: Compiled, weights: Sequence[CompiledWeight], dtype: torch.dtype) -> Tensor:
    """Weights of one layout below each other, [all out_features, in_features]."""
    made = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    return library.dequantize(weights, made).to(dtype)


@dataclass(frozen=True, slots=True)
class CpuLinear:
    """One linear."""

    library: Compiled
    weight: CompiledWeight

    def __call__(self, inputs: Tensor) -> Tensor:
        rows = inputs.numel() // inputs.shape[-1]
        if rows <= FEW_TOKENS:
            output = self.library.product(self.weight, inputs.reshape(rows, inputs.shape[-1]))
            return output.to(inputs.dtype).view(*inputs.shape[:-1], self.weight.shape[0])
        if self.library.has_tiles(self.weight, inputs.dtype):
            output = self.library.tile_product(self.weight, inputs.reshape(rows, inputs.shape[-1]))
            return output.view(*inputs.shape[:-1], self.weight.shape[0])
        return functional.linear(inputs, dense(self.library, [self.weight], inputs.dtype))

    def tensors(self) -> Iterator[Tensor]:
        return self.weight.tensors()


@dataclass(frozen=True, slots=True)
class CpuExperts:
    """A sparse block's experts."""

    library: Compiled
    mlps: Sequence[Sequence[LinearOperator]]
    """gate, up and down of each."""
    act: Activation
    fused: CompiledExperts | None

    def __call__(self, inputs: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        if self.fused is not None and len(inputs) <= FEW_TOKENS:
            return self.library.experts(self.fused, inputs, chosen, weights).to(inputs.dtype)
        if self.fused is not None and self._tiled(self.fused, inputs.dtype):
            return self.library.tile_experts(self.fused, inputs, chosen, weights).to(inputs.dtype)
        return routed(inputs, chosen, weights, len(self.mlps), self._expert)

    def _tiled(self, fused: CompiledExperts, dtype: torch.dtype) -> bool:
        return fused.alike and all(self.library.has_tiles(weight, dtype) for mlp in fused.weights for weight in mlp)

    def _expert(self, expert: int, inputs: Tensor) -> Tensor:
        gate, up, down = self.mlps[expert]
        if self.fused is None or len(inputs) <= FEW_TOKENS:
            return down(self.act(gate(inputs)) * up(inputs))
        # One product for both: torch is quicker with one large than with two small ones.
        both = functional.linear(inputs, dense(self.library, self.fused.gate_and_up(expert), inputs.dtype))
        half = both.shape[-1] // 2
        return down(self.act(both[:, :half]).mul_(both[:, half:]))

    def tensors(self) -> Iterator[Tensor]:
        return (tensor for mlp in self.mlps for operator in mlp for tensor in operator.tensors())


@dataclass(frozen=True, slots=True)
class CpuBackend:
    """C++ on packed weights."""

    library: Compiled
    device: torch.device
    name: str = "cpu"

    def linear(self, weight: PackedWeight) -> LinearOperator:
        """The operator of one linear."""
        described = describe(weight)
        return ReferenceLinear(weight) if described is None else CpuLinear(self.library, described)

    def experts(self, experts: Sequence[PackedMlp], act: Activation) -> ExpertsOperator:
        """The operator of a sparse block's experts."""
        mlps = [[self.linear(weight) for weight in mlp.weights()] for mlp in experts]
        compiled = [[one.weight for one in mlp if isinstance(one, CpuLinear)] for mlp in mlps]
        whole = type(act).__name__ in _SILU and all(len(mlp) == 3 for mlp in compiled)
        return CpuExperts(self.library, mlps, act, CompiledExperts.of(compiled) if whole else None)


def create(device: torch.device) -> Backend:
    """The backend."""
    library = Compiled.load()
    return ReferenceBackend(device, "cpu") if library is None else CpuBackend(library, device)
