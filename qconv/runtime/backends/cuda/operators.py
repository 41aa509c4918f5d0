"""Linears and experts that multiply with packed weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qconv.runtime.backends.base import Activation
from qconv.runtime.backends.cuda.launch import Launcher
from qconv.runtime.backends.cuda.products import Rows, multiply, row_tile
from qconv.runtime.backends.cuda.routing import route
from qconv.runtime.backends.cuda.weights import aligned, tensors
from qconv.runtime.backends.reference import ReferenceBackend
from qconv.runtime.kernel_interface import ACTIVATIONS, KernelWeight
from qconv.runtime.packed import PackedMlp, PackedWeight


@dataclass(frozen=True, slots=True)
class CudaLinear:
    """One packed weight.

    Attributes:
        weight: On the device.
        launcher: Runs the kernels.
        source: The weight as it was given, for dtypes that the kernels do not compute in.
        torch: The backend for those.
    """

    weight: KernelWeight
    launcher: Launcher
    source: PackedWeight
    torch: ReferenceBackend

    def __call__(self, inputs: Tensor) -> Tensor:
        if inputs.dtype not in ACTIVATIONS:
            return self.torch.linear(self.source)(inputs)
        flat = aligned(inputs.reshape(-1, self.weight.depth))
        shape = (*inputs.shape[:-1], self.weight.columns)
        if not len(flat):
            return inputs.new_empty(shape)
        return multiply(self.launcher, self.weight, flat, Rows(len(flat), 1, row_tile(len(flat)))).view(shape)

    def tensors(self) -> Iterator[Tensor]:
        """What it keeps on the device."""
        yield from tensors(self.weight).values()


@dataclass(frozen=True, slots=True)
class CudaExperts:
    """A sparse block's experts: one launch for all of them, each weight read for the rows that chose it.

    Attributes:
        inner: gate and up: one weight with the outputs of both, or two; experts one after the other.
        down: Likewise.
        act: The activation of the gate.
        launcher: Runs the kernels.
        source: The experts as they were given, for dtypes that the kernels do not compute in.
        torch: The backend for those.
    """

    inner: tuple[KernelWeight, ...]
    down: KernelWeight
    act: Activation
    launcher: Launcher
    source: Sequence[PackedMlp]
    torch: ReferenceBackend

    def __call__(self, inputs: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        if inputs.dtype not in ACTIVATIONS:
            return self.torch.experts(self.source, self.act)(inputs, chosen, weights)
        if not len(inputs):
            return torch.empty_like(inputs)
        rows = route(chosen, len(self.source))
        flat = aligned(inputs)
        answers = [multiply(self.launcher, weight, flat, rows) for weight in self.inner]
        gate, up = answers if len(answers) == 2 else answers[0].chunk(2, dim=-1)
        hidden = aligned(self.act(gate) * up)
        outputs = multiply(self.launcher, self.down, hidden, replace(rows, per_input=1))
        chosen_outputs = outputs.view(*chosen.shape, self.down.columns).float()
        return (chosen_outputs * weights.float().unsqueeze(-1)).sum(1).to(inputs.dtype)

    def tensors(self) -> Iterator[Tensor]:
        """What it keeps on the device."""
        for weight in (*self.inner, self.down):
            yield from tensors(weight).values()
