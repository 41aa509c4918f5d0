"""Which tokens each MLP of a layer sees, and how much its output counts for each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qconv.artifacts.source import Source
from qconv.calibration.forward import Decoder
from qconv.calibration.layer import Workspace
from qconv.core.architecture import Layer, Moe
from qconv.core.devices import CPU


@dataclass(frozen=True, slots=True)
class Assignment:
    """Tokens of one MLP: int64 [n], ascending, and the factor on its output for each: float32 [n], both on the host.

    ``on_inputs`` says that the factor is on its input.
    """

    tokens: Tensor
    weights: Tensor
    on_inputs: bool = False

    def __getitem__(self, part: slice | Tensor) -> Assignment:
        """Some of the tokens."""
        return Assignment(self.tokens[part], self.weights[part], self.on_inputs)

    def read(self, normed: Tensor) -> Tensor:
        """What the MLP reads for its tokens' normed activations, [n, hidden]."""
        return normed * self.weights.to(normed.device).unsqueeze(-1) if self.on_inputs else normed

    def counted(self, output: Tensor) -> Tensor:
        """What it adds to what runs through the layers, [n, hidden], in the place of its output."""
        return output if self.on_inputs else output.mul_(self.weights.to(output.device).unsqueeze(-1))

    @property
    def factors(self) -> Tensor:
        """What its output counts for each token, float32 [n]."""
        return torch.ones_like(self.weights) if self.on_inputs else self.weights


class Routing:
    """The router's decisions for all calibration tokens."""

    def __init__(
        self, source: Source, decoder: Decoder, layer: Layer, work: Workspace, norm: nn.Module, device: torch.device
    ) -> None:
        """Run the router (and the shared expert's gate) over the layer's middle activations, normalized by ``norm``.

        What it decides is on the host, whatever the device; ``norm`` is on that.
        """
        self._tokens = work.tokens
        self._experts = 0
        self._on_inputs = isinstance(layer.mlp, Moe) and layer.mlp.scales_inputs
        self._shared: Tensor | None = None
        mlp = layer.mlp
        if not isinstance(mlp, Moe):
            return
        self._experts = len(mlp.experts)
        router = decoder.router(layer, mlp, lambda name: source.read(name).to(device))
        gate = mlp.shared_expert_gate
        gate_weight = None if gate is None else source.read(gate.weight).to(device).float()
        chosen, factors, shared = [], [], []
        for start, stop in work.middle.windows():
            normed: Tensor = norm(work.middle.read(start, stop, device))
            scores, indices = router(normed)
            chosen.append(indices.to(torch.int32).cpu())
            factors.append(scores.float().cpu())
            if gate_weight is not None:
                shared.append(torch.sigmoid(normed @ gate_weight.t()).squeeze(-1).cpu())
        if shared:
            self._shared = torch.cat(shared)
        experts = torch.cat(chosen)
        self.top_k = experts.shape[1]
        # Sorting the (token, expert) pairs by expert leaves each expert's tokens as one ascending run.
        self._order = experts.flatten().argsort(stable=True)
        self._factors = torch.cat(factors).flatten()
        self.counts = torch.bincount(experts.flatten(), minlength=self._experts)
        self._ends = self.counts.cumsum(0)

    def assignment(self, index: int) -> Assignment:
        """The tokens of the layer's MLP ``index``: an expert, or the shared expert after them, or the dense MLP."""
        if index >= self._experts:
            weights = torch.ones(self._tokens, device=CPU) if self._shared is None else self._shared
            return Assignment(torch.arange(self._tokens, device=CPU), weights)
        end = int(self._ends[index])
        pairs = self._order[end - int(self.counts[index]) : end]
        return Assignment(pairs // self.top_k, self._factors[pairs], self._on_inputs)
