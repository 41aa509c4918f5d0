"""A gated MLP on plain tensors: what an expert computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qconv.artifacts.source import Source
from qconv.calibration.schemes import Scheme, dense
from qconv.core.architecture import Mlp
from qconv.core.grid import Packed
from qconv.models.gating import Gating


@dataclass(frozen=True, slots=True)
class GatedWeights:
    """``down(act(gate(x)) * up(x))``: gate and up float32 [inner, hidden], down float32 [hidden, inner]."""

    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    gating: Gating

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.gate.device

    def replaced(
        self,
        *,
        gate: Tensor | None = None,
        up: Tensor | None = None,
        down: Tensor | None = None,
        up_bias: Tensor | None = None,
    ) -> GatedWeights:
        """The same MLP with some tensors exchanged."""
        return replace(
            self,
            gate=self.gate if gate is None else gate,
            up=self.up if up is None else up,
            down=self.down if down is None else down,
            up_bias=self.up_bias if up_bias is None else up_bias,
        )

    def inner(self, inputs: Tensor) -> Tensor:
        """down's input, float32 [tokens, inner], for inputs [tokens, hidden]."""
        gate = torch.nn.functional.linear(inputs, self.gate, self.gate_bias)
        return self.gated(gate, torch.nn.functional.linear(inputs, self.up, self.up_bias))

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """down's input from the outputs of gate and up, biases included, float32 [tokens, inner] each."""
        return self.gating(gate, up)

    def rounded_inner(self, inputs: Tensor, schemes: tuple[Scheme, Scheme], scale: Tensor | None = None) -> Tensor:
        """down's input with gate and up rounded to nearest after their columns were multiplied by ``scale``.

        Args:
            inputs: float32 [tokens, hidden], not divided by ``scale`` yet.
            schemes: Of gate and of up.
            scale: float32 [hidden], or None.
        """
        scaled = inputs if scale is None else inputs / scale
        gate, up = (
            scheme.linear(scaled, weight, scale) for scheme, weight in zip(schemes, (self.gate, self.up), strict=True)
        )
        if self.gate_bias is not None:
            gate.add_(self.gate_bias)
        if self.up_bias is not None:
            up.add_(self.up_bias)
        return self.gated(gate, up)

    def project(self, inner: Tensor) -> Tensor:
        """The output, float32 [tokens, hidden], from down's input."""
        return torch.nn.functional.linear(inner, self.down, self.down_bias)

    def __call__(self, inputs: Tensor) -> Tensor:
        """The output, float32 [tokens, hidden], for inputs [tokens, hidden]."""
        return self.project(self.inner(inputs))


@dataclass(frozen=True, slots=True)
class StagedWeights:
    """An MLP's weights on the host in their stored dtype, read before a device is borrowed for them.

    Attributes:
        weights: Of gate, up and down, on their way to a device in pinned memory, so that nothing waits for the bus.
        biases: The same; None for a linear that has none.
        gating: What is made of the outputs of gate and up.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    gating: Gating

    @classmethod
    def read(cls, source: Source, mlp: Mlp, gating: Gating, *, pin: bool) -> StagedWeights:
        """One MLP's weights from the source; ``pin`` where they go to a device.

        Raises:
            CheckpointError: not readable, or values that are not finite.
        """

        def read(name: str) -> Tensor:
            tensor = source.read(name)
            return tensor.pin_memory() if pin else tensor

        linears = mlp.linears()
        biases = tuple(read(f"{linear.name}.bias") if linear.bias else None for linear in linears)
        return cls(tuple(read(linear.weight) for linear in linears), biases, gating)

    def on(self, device: torch.device) -> GatedWeights:
        """In float32 on a device."""

        def brought(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True).float()

        gate, up, down = (weight.to(device, non_blocking=True).float() for weight in self.weights)
        gate_bias, up_bias, down_bias = map(brought, self.biases)
        return GatedWeights(gate, up, down, gate_bias, up_bias, down_bias, self.gating)


@dataclass(frozen=True, slots=True)
class FoldedScales:
    """What one MLP's inputs and its down's inputs are divided by; None for nothing."""

    shared: Tensor | None
    inner: Tensor | None

    def fold(self, weights: GatedWeights) -> GatedWeights:
        """The weights in the folded coordinates: their input is the folded norm's output."""
        gate, up, down, up_bias = weights.gate, weights.up, weights.down, weights.up_bias
        if self.shared is not None:
            gate, up = gate * self.shared, up * self.shared
        if self.inner is not None:
            up, down = up / self.inner.unsqueeze(-1), down * self.inner
            up_bias = None if up_bias is None else up_bias / self.inner
        return weights.replaced(gate=gate, up=up, down=down, up_bias=up_bias)

    def unfold_input(self, weights: GatedWeights) -> GatedWeights:
        """The same MLP for the unfolded norm's output."""
        if self.shared is None:
            return weights
        return weights.replaced(gate=weights.gate / self.shared, up=weights.up / self.shared)


def dequantized(mlp: Mlp, folded: GatedWeights, quantized: Mapping[str, Packed]) -> GatedWeights:
    """The MLP as the build computes it, in the folded coordinates; linears by module name, absent ones as they are."""
    gate, up, down = (
        dense(quantized[linear.name], weight.device) if linear.name in quantized else weight
        for linear, weight in zip(mlp.linears(), (folded.gate, folded.up, folded.down), strict=True)
    )
    return folded.replaced(gate=gate, up=up, down=down)
