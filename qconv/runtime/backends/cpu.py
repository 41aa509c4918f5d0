"""The backend of machines without a GPU: C++ on the packed weights, or torch where there is no compiler.

Few tokens are multiplied with the packed weight itself, which reads a quarter of what a dense one takes. For more,
parts of a weight are decoded into the caches and all tokens meet them there, by the processor's matrix unit or AVX-512.
On other processors, and for float32 and float16, a weight is made dense, one at a time, and multiplied by torch.
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


def by_tiles(tiles_from: int, rows: int, dtype: torch.dtype) -> bool:
    """Whether so many activations are multiplied by tiles."""
    return 0 < tiles_from <= rows and dtype == torch.bfloat16


@dataclass(frozen=True, slots=True)
class CpuLinear:
    """One linear."""

    library: Compiled
    weight: CompiledWeight
    tiles_from: int
    """From how many rows of bfloat16 on it is multiplied by tiles; 0: never."""

    def __call__(self, inputs: Tensor) -> Tensor:
        rows = inputs.numel() // inputs.shape[-1]
        if by_tiles(self.tiles_from, rows, inputs.dtype):
            output = self.library.tile_product(self.weight, inputs.reshape(rows, inputs.shape[-1]))
        elif rows <= FEW_TOKENS:
            output = self.library.product(self.weight, inputs.reshape(rows, inputs.shape[-1])).to(inputs.dtype)
        else:
            return functional.linear(inputs, dense(self.library, [self.weight], inputs.dtype))
        return output.view(*inputs.shape[:-1], self.weight.shape[0])

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
    tiles_from: int
    """From how many tokens of bfloat16 on all are computed by tiles; 0: never."""

    def __call__(self, inputs: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        if self.fused is not None and by_tiles(self.tiles_from, len(inputs), inputs.dtype):
            return self.library.tile_experts(self.fused, inputs, chosen, weights).to(inputs.dtype)
        if self.fused is not None and len(inputs) <= FEW_TOKENS:
            return self.library.experts(self.fused, inputs, chosen, weights).to(inputs.dtype)
        return routed(inputs, chosen, weights, len(self.mlps), self._expert)

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
        if described is None:
            return ReferenceLinear(weight)
        return CpuLinear(self.library, described, self.library.tiles_from(described))

    def experts(self, experts: Sequence[PackedMlp], act: Activation) -> ExpertsOperator:
        """The operator of a sparse block's experts."""
        mlps = [[self.linear(weight) for weight in mlp.weights()] for mlp in experts]
        compiled = [[one for one in mlp if isinstance(one, CpuLinear)] for mlp in mlps]
        if type(act).__name__ not in _SILU or any(len(mlp) < 3 for mlp in compiled):
            return CpuExperts(self.library, mlps, act, None, 0)
        fused = CompiledExperts.of([[one.weight for one in mlp] for mlp in compiled])
        least = [one.tiles_from for mlp in compiled for one in mlp]
        return CpuExperts(self.library, mlps, act, fused, max(least) if fused.alike and all(least) else 0)


def create(device: torch.device) -> Backend:
    """The backend."""
    library = Compiled.load()
    return ReferenceBackend(device, "cpu") if library is None else CpuBackend(library, device)
