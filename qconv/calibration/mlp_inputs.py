"""What the MLPs of a layer see: the tokens that are routed to each, their inputs, and statistics of those."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qconv.calibration.layer import LayerBuild, LayerContext, Workspace
from qconv.calibration.mlp import GatedWeights
from qconv.calibration.rounding import empty_statistics, statistics_width
from qconv.calibration.routing import Assignment, Routing
from qconv.calibration.statistics import InputSquares, InputStatistics
from qconv.core.architecture import Linear, Mlp, Moe
from qconv.core.devices import CPU
from qconv.core.once import MadeOnce

WINDOW_TOKENS = 2048
POOL_TOKENS = 256
"""Tokens of the layer as a whole that stand in for an expert's missing ones."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Inputs on which losses are measured, float32 [n, hidden], and the weight of each token's squared error, [n]."""

    inputs: Tensor
    weights: Tensor

    def loss(self, output: Tensor, target: Tensor) -> float:
        """The weighted squared distance of two outputs, float32 [n, hidden]."""
        return float(((output - target).square_().sum(-1) * self.weights).sum(dtype=torch.float64))


class MlpInputs:
    """The inputs of a layer's MLPs, which all builds of it share.

    Attributes:
        layer: Statistics of the MLPs' common input over all tokens, by the width that builds ask for.
        reference: The activations of the unquantized model, where they are compared.
        reference_routing: Where its router sends the tokens; None where nobody needs its outputs.
    """

    def __init__(self, context: LayerContext) -> None:
        """Route all tokens and look at the common input."""
        self.context = context
        norm = context.layer.post_attention_norm
        self.norm_weight = context.source.read(norm.weight)
        # What experts read wherever they are.
        self._norm = MadeOnce(lambda device: context.decoder.norm(context.layer, norm, self.norm_weight.to(device)))
        self._layer_on = MadeOnce(lambda width, device: self.layer[width].to(device))
        self.routing = self._routed(context.work)
        self.reference = context.work.reference
        self.reference_routing: Routing | None = None
        if self.reference is not None and not context.is_last:
            self.reference_routing = self._routed(self.reference)
        self.shrinkage = context.calibration.shrinkage_tokens
        self.layer = self._layer_inputs()
        for build in context.builds:
            build.keep_squares(self.layer[self.width(build)], context.layer.routers())
            build.keep_peak(self.layer[self.width(build)].peak, self._readers())
        count = min(POOL_TOKENS, context.work.tokens)
        shuffled = torch.randperm(context.work.tokens, generator=context.generator(0), device=CPU)
        picks = shuffled[:count].sort().values
        self.pool = self.normed(picks, context.home)

    def _routed(self, work: Workspace) -> Routing:
        context = self.context
        norm = self._norm(context.home)
        return Routing(context.source, context.decoder, context.layer, work, norm, context.home)

    def _layer_inputs(self) -> dict[int, InputStatistics]:
        context = self.context
        found = empty_statistics(context.model.hidden_size, map(self.width, context.builds), context.home)
        for start, stop in context.work.middle.windows(WINDOW_TOKENS):
            normed = self._norm(context.home)(context.work.middle.read(start, stop, context.home))
            for statistics in found.values():
                statistics.update(normed)
            if context.seen is not None:
                context.see(context.layer.routers(), InputSquares.of(normed))
        return found

    def _readers(self) -> list[Linear]:
        """The linears that read the normed stream."""
        return [linear for mlp in self.context.layer.mlps() for linear in (mlp.gate, mlp.up)]

    def width(self, build: LayerBuild) -> int:
        """The width of the second moments that a build asks for of the inputs of gate and up."""
        return statistics_width(build, self._readers())

    def normed(self, tokens: Tensor, device: torch.device, work: Workspace | None = None) -> Tensor:
        """The MLPs' inputs for chosen tokens, float32 [n, hidden], on a device; in the quantized model."""
        normed: Tensor = self._norm(device)((work or self.context.work).middle.gather(tokens, device))
        return normed

    def assignment(self, index: int) -> Assignment:
        """The tokens that the statistics of an MLP are made of."""
        routed = self.routing.assignment(index)
        if self.context.calibration.routing == "routed":
            return routed
        tokens = self.context.work.tokens
        weights = torch.full((tokens,), self._mean_weight(routed), device=CPU)
        weights[routed.tokens] = routed.weights
        return Assignment(torch.arange(tokens, device=CPU), weights, routed.on_inputs)

    def _mean_weight(self, assignment: Assignment) -> float:
        """The usual factor on an expert's output, for tokens that were not routed to it."""
        if len(assignment.weights):
            return float(assignment.weights.mean())
        mlp = self.context.layer.mlp
        return 1.0 / mlp.top_k if isinstance(mlp, Moe) else 1.0

    def sample(self, index: int, assignment: Assignment, size: int, device: torch.device) -> Sample:
        """About ``size`` tokens of an MLP on a device, mixed with the layer's pool in the proportion of the shrinkage.

        Each token stands for its share of the population: n own tokens and k of the layer's.
        """
        own, k = len(assignment.tokens), float(self.shrinkage)
        shared = 0 if own + k == 0 else min(len(self.pool), round(size * k / (own + k)))
        if own == 0:
            shared = max(shared, min(size, len(self.pool)))
        shuffled = torch.randperm(own, generator=self.context.generator(1 + index), device=CPU)
        picks = shuffled[: size - shared].sort().values
        chosen = assignment[picks]
        inputs = torch.cat([chosen.read(self.normed(chosen.tokens, device)), self._pool(assignment, device)[:shared]])
        own_weights = chosen.factors.square() * (own / max(len(picks), 1))
        mean = 1.0 if assignment.on_inputs else self._mean_weight(assignment)
        shared_weight = mean**2 * (max(k, 1.0) / max(shared, 1))
        weights = torch.cat([own_weights, torch.full((shared,), shared_weight, device=CPU)])
        return Sample(inputs, weights.to(device))

    def _pool(self, assignment: Assignment, device: torch.device) -> Tensor:
        """The layer's pool, as an MLP would read it, on a device."""
        pool = self.pool.to(device)
        return pool * self._mean_weight(assignment) if assignment.on_inputs else pool

    def _shared_statistics(self, width: int, assignment: Assignment, device: torch.device) -> InputStatistics:
        """Those of the layer, as an MLP would read them, on a device."""
        layer = self._layer_on(width, device)
        if not assignment.on_inputs:
            return layer
        hidden, factor = self.context.model.hidden_size, 1.0 / self._mean_weight(assignment)
        return layer.rescaled(torch.full((hidden,), factor, device=device))

    def statistics(
        self, mlp: Mlp, assignment: Assignment, asked: Sequence[tuple[LayerBuild, int]], device: torch.device
    ) -> dict[int, InputStatistics]:
        """Statistics of gate's and up's input, shrunk toward the layer's, by width.

        Args:
            mlp: Whose.
            assignment: On which tokens.
            asked: Builds, and the width of the second moments that each asks for.
            device: Where they are made.
        """
        if not asked:
            return {}
        hidden, widths = self.context.model.hidden_size, [width for _, width in asked]
        found = empty_statistics(hidden, widths, device, drift=self.reference is not None)
        for normed, counts, unquantized in self.windows(assignment, device):
            for statistics in found.values():
                statistics.update(normed, counts, unquantized)
        for build, width in asked:
            build.keep_squares(found[width], (mlp.gate, mlp.up))
        return {
            width: found.pop(width).shrunk(self._shared_statistics(width, assignment, device), float(self.shrinkage))
            for width in [*found]
        }

    def inner_statistics(
        self,
        mlp: Mlp,
        weights: tuple[GatedWeights, GatedWeights],
        assignment: Assignment,
        asked: Sequence[tuple[LayerBuild, int]],
    ) -> dict[int, InputStatistics]:
        """Statistics of down's input, shrunk toward those of the layer's pool, by width.

        Args:
            mlp: Whose.
            weights: Those of the source, and what computes down's input from the unfolded norm's output.
            assignment: On which tokens.
            asked: Builds, and the width of the second moments that each asks for.
        """
        if not asked:
            return {}
        source, passing = weights
        device = source.device
        in_features, widths = mlp.down.in_features, [width for _, width in asked]
        found = empty_statistics(in_features, widths, device, drift=self.reference is not None)
        for normed, counts, unquantized in self.windows(assignment, device):
            reference = None if unquantized is None else source.inner(unquantized)
            inner = passing.inner(normed)
            for statistics in found.values():
                statistics.update(inner, counts, reference)
        pooled, inner = empty_statistics(in_features, widths, device), passing.inner(self._pool(assignment, device))
        for statistics in pooled.values():
            statistics.update(inner)
        for build, width in asked:
            build.keep_squares(found[width], (mlp.down,))
            build.keep_peak(max(found[width].peak, pooled[width].peak), (mlp.down,))
        return {width: found.pop(width).shrunk(pooled.pop(width), float(self.shrinkage)) for width in [*found]}

    def windows(
        self, assignment: Assignment, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
        """An MLP's inputs, float32 [n, hidden], what each token counts, float32 [n] or None for 1, and the unquantized
        model's inputs, where they are compared; all on a device.
        """
        counts: Tensor | None = None
        weighted = self.context.calibration.token_weights == "router" and not assignment.on_inputs
        if weighted and len(assignment.weights):
            squares = assignment.weights.square()
            counts = (squares / squares.mean()).to(device)
        for start in range(0, len(assignment.tokens), WINDOW_TOKENS):
            stop = start + WINDOW_TOKENS
            part = assignment[start:stop]
            unquantized = None
            if self.reference is not None:
                unquantized = part.read(self.normed(part.tokens, device, self.reference))
            yield (
                part.read(self.normed(part.tokens, device)),
                None if counts is None else counts[start:stop],
                unquantized,
            )
