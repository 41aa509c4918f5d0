"""The MLP half of a layer: every expert streamed through with the tokens that the router sends it.

Two passes over the experts' weights. The first measures for each candidate scale of the post-attention norm the loss
summed over all experts, since they and the router share that one scale. The second calibrates, quantizes and applies
the experts one by one. Each worker thread holds one expert, and nothing is held for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qconv.calibration.layer import Finished, LayerContext
from qconv.calibration.mlp import GatedWeights
from qconv.calibration.routing import Assignment, Routing
from qconv.calibration.statistics import InputStatistics, block_width
from qconv.folding import norm_scale
from qconv.methods import awq
from qconv.methods.base import fake_quantize, rounded_linear
from qconv.models.base import Mlp, Moe
from qconv.qtensor import QTensor

WINDOW_TOKENS = 2048
DEFERRED_TOKENS = 16384
"""An expert with more tokens hands its outputs on window by window instead of all at once."""
POOL_TOKENS = 256
"""Tokens of the layer as a whole that stand in for an expert's missing ones."""
SHARED_SEARCH_TOKENS = 4096
"""Tokens on which the shared scale's loss is measured, spread over the layer's experts."""


def calibrate_mlps(context: LayerContext) -> Iterator[Finished]:
    """Quantize the MLPs of a layer and add their outputs to the layer's running output.

    Yields the modules in the order of the plan: post-attention norm, routers, then each MLP's gate, up and down.
    """
    half = _MlpHalf(context)
    half.search_shared_scale()
    yield context.dense(context.layer.post_attention_norm)
    for router in context.layer.routers():
        yield context.dense(router)
    yield from half.quantize_all()


@dataclass(frozen=True, slots=True)
class _Sample:
    """Inputs on which losses are measured, float32 [n, hidden], and the weight of each token's squared error, [n]."""

    inputs: Tensor
    weights: Tensor

    def loss(self, output: Tensor, target: Tensor) -> float:
        return float(((output - target).square_().sum(-1) * self.weights).sum(dtype=torch.float64))


@dataclass(frozen=True, slots=True)
class _Scales:
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


@dataclass(frozen=True, slots=True)
class _Result:
    """One calibrated MLP: its quantized weights by name, the scale folded into up, its record, its weighted outputs."""

    weights: dict[str, QTensor]
    inner_scale: Tensor | None
    record: dict[str, Any]
    routed: Iterator[tuple[Tensor, Tensor]] | None


class _MlpHalf:
    def __init__(self, context: LayerContext) -> None:
        self.context = context
        norm = context.layer.post_attention_norm
        self.norm_weight = context.source.read(norm.weight)
        self.norm = context.decoder.norm(context.layer, norm, self.norm_weight)
        self.routing = Routing(context, self.norm)
        self.shrinkage = context.recipe.calibration.shrinkage_tokens
        hidden = context.model.hidden_size
        self.input_width = self._block_width(hidden)
        self.layer_inputs = InputStatistics.empty(hidden, self.input_width)
        for start, stop in context.work.middle.windows(WINDOW_TOKENS):
            self.layer_inputs.update(self.norm(context.work.middle.read(start, stop)))
        count = min(POOL_TOKENS, context.work.tokens)
        picks = torch.randperm(context.work.tokens, generator=context.generator(0))[:count].sort().values
        self.pool = self._normed(picks)

    def _block_width(self, in_features: int) -> int:
        return block_width(in_features, self.context.grid.width(in_features))

    def _normed(self, tokens: Tensor) -> Tensor:
        """The MLPs' inputs for chosen tokens, float32 [n, hidden]."""
        normed: Tensor = self.norm(self.context.work.middle.gather(tokens))
        return normed

    def _calibration_tokens(self, index: int) -> Assignment:
        """The tokens that the statistics of an MLP are made of."""
        routed = self.routing.assignment(index)
        if self.context.recipe.calibration.routing == "routed":
            return routed
        tokens = self.context.work.tokens
        weights = torch.full((tokens,), self._mean_weight(routed))
        weights[routed.tokens] = routed.weights
        return Assignment(torch.arange(tokens), weights)

    def _mean_weight(self, assignment: Assignment) -> float:
        """The usual factor on an expert's output, for tokens that were not routed to it."""
        if len(assignment.weights):
            return float(assignment.weights.mean())
        mlp = self.context.layer.mlp
        return 1.0 / mlp.top_k if isinstance(mlp, Moe) else 1.0

    def _sample(self, index: int, assignment: Assignment, size: int) -> _Sample:
        """About ``size`` tokens of an MLP, mixed with the layer's pool in the proportion of the shrinkage.

        Each token stands for its share of the population: n own tokens and k of the layer's.
        """
        own, k = len(assignment.tokens), float(self.shrinkage)
        shared = 0 if own + k == 0 else min(len(self.pool), round(size * k / (own + k)))
        if own == 0:
            shared = max(shared, min(size, len(self.pool)))
        picks = torch.randperm(own, generator=self.context.generator(1 + index))[: size - shared].sort().values
        inputs = torch.cat([self._normed(assignment.tokens[picks]), self.pool[:shared]])
        own_weights = assignment.weights[picks].square() * (own / max(len(picks), 1))
        shared_weight = self._mean_weight(assignment) ** 2 * (max(k, 1.0) / max(shared, 1))
        return _Sample(inputs, torch.cat([own_weights, torch.full((shared,), shared_weight)]))

    def search_shared_scale(self) -> None:
        """Choose what is folded into the post-attention norm, by the loss of all MLPs' outputs together."""
        context, mlps = self.context, self.context.layer.mlps()
        if not context.all_quantized([linear for mlp in mlps for linear in (mlp.gate, mlp.up)]):
            return
        candidates = awq.candidate_scales(self.layer_inputs.magnitude, context.recipe.awq.alpha_points)
        if context.layer.routers():
            # The router stays in 16 bits; powers of two fold into it without a rounding that would shift the routing.
            candidates = [awq.nearest_power_of_two(scale) for scale in candidates]
        scales = [norm_scale(self.norm_weight, scale) for scale in candidates]
        size = min(context.recipe.awq.search_tokens, max(16, SHARED_SEARCH_TOKENS // len(mlps)))

        def losses(index: int) -> list[float]:
            weights = GatedWeights.read(context.source, mlps[index], context.decoder.act)
            sample = self._sample(index, self._calibration_tokens(index), size)
            target = weights(sample.inputs)
            found = []
            for scale in scales:
                inner = weights.rounded_inner(sample.inputs, context.grid, scale)
                found.append(sample.loss(weights.project(inner), target))
            return found

        table = list(context.workers.map(losses, range(len(mlps))))
        choice = awq.choose([math.fsum(column) for column in zip(*table, strict=True)])
        context.report.search(context.layer.post_attention_norm.name, choice)
        if choice.index:
            context.scales[context.layer.post_attention_norm.name] = scales[choice.index]

    def quantize_all(self) -> Iterator[Finished]:
        """Calibrate and quantize every MLP, and add its output for the tokens that it sees."""
        context, mlps = self.context, self.context.layer.mlps()
        for index, result in enumerate(context.workers.map(self._quantize, range(len(mlps)))):
            mlp = mlps[index]
            if result.inner_scale is not None:
                context.scales[mlp.up.name] = result.inner_scale
            context.report.experts.append(result.record)
            for linear in mlp.linears():
                yield context.finished(linear, result.weights.get(linear.name))
            if result.routed is not None:
                # In the order of the experts, so that sums come out the same however the threads ran.
                for tokens, output in result.routed:
                    context.work.total.add(tokens, output)

    def _quantize(self, index: int) -> _Result:
        context, mlp = self.context, self.context.layer.mlps()[index]
        weights = GatedWeights.read(context.source, mlp, context.decoder.act)
        assignment = self._calibration_tokens(index)
        inputs, inner = self._statistics(weights, assignment)
        sample = self._sample(index, assignment, context.recipe.awq.search_tokens)
        routed = self.routing.assignment(index)
        record: dict[str, Any] = {
            "module": mlp.gate.name.rpartition(".")[0],
            "tokens": len(routed.tokens),
            "calibration_tokens": len(assignment.tokens),
            "shrinkage": round(self.shrinkage / max(len(assignment.tokens) + self.shrinkage, 1), 6),
        }
        inner_scale = None
        if context.all_quantized((mlp.up, mlp.down)):
            inner_scale = self._search_inner_scale(weights, inner, sample, record)
        scales = _Scales(context.folds.input_scale(mlp.up), inner_scale)
        folded = scales.fold(weights)
        quantized = self._round(mlp, weights, folded, scales, (inputs, inner), sample, record)
        output: Iterator[tuple[Tensor, Tensor]] | None = None
        if not context.is_last:
            propagate = context.recipe.calibration.propagate
            passing = scales.unfold_input(_dequantized(mlp, folded, quantized)) if propagate else weights
            output = self._outputs(routed, passing)
            if len(routed.tokens) <= DEFERRED_TOKENS:
                output = iter(list(output))
        return _Result(quantized, inner_scale, record, output)

    def _statistics(self, weights: GatedWeights, assignment: Assignment) -> tuple[InputStatistics, InputStatistics]:
        """Statistics of gate's and up's input and of down's, shrunk toward the layer's."""
        inputs = InputStatistics.empty(self.context.model.hidden_size, self.input_width)
        inner_features = weights.down.shape[1]
        inner_width = self._block_width(inner_features)
        inner = InputStatistics.empty(inner_features, inner_width)
        for start in range(0, len(assignment.tokens), WINDOW_TOKENS):
            normed = self._normed(assignment.tokens[start : start + WINDOW_TOKENS])
            inputs.update(normed)
            inner.update(weights.inner(normed))
        pooled = InputStatistics.empty(inner_features, inner_width)
        pooled.update(weights.inner(self.pool))
        strength = float(self.shrinkage)
        return inputs.shrunk(self.layer_inputs, strength), inner.shrunk(pooled, strength)

    def _search_inner_scale(
        self, weights: GatedWeights, inner: InputStatistics, sample: _Sample, record: dict[str, Any]
    ) -> Tensor | None:
        """up's output feeds down alone: dividing up's rows is free, since its groups run along its input."""
        scales = awq.candidate_scales(inner.magnitude, self.context.recipe.awq.alpha_points)
        activations = weights.inner(sample.inputs)
        target = activations @ weights.down.t()
        losses = []
        for scale in scales:
            output = rounded_linear(activations / scale, weights.down, self.context.grid, scale)
            losses.append(sample.loss(output, target))
        choice = awq.choose(losses)
        record |= {"alpha": round(choice.alpha, 4), "kept_rtn": choice.index == 0}
        return scales[choice.index] if choice.index else None

    def _round(
        self,
        mlp: Mlp,
        weights: GatedWeights,
        folded: GatedWeights,
        scales: _Scales,
        statistics: tuple[InputStatistics, InputStatistics],
        sample: _Sample,
        record: dict[str, Any],
    ) -> dict[str, QTensor]:
        """Quantize the folded weights, with clipping where that helps the MLP's output; record what it cost."""
        context = self.context
        plain: dict[str, QTensor] = {}
        clipped: dict[str, QTensor] = {}
        inputs, inner = (
            seen if scale is None else seen.rescaled(scale)
            for seen, scale in zip(statistics, (scales.shared, scales.inner), strict=True)
        )
        seen_by = (inputs, inputs, inner)
        for linear, weight, seen in zip(mlp.linears(), (folded.gate, folded.up, folded.down), seen_by, strict=True):
            if linear.name not in context.quantized:
                continue
            plain[linear.name] = awq.quantize(weight, context.grid, None)
            if context.recipe.searches_clipping:
                ratios = awq.output_clip_ratios(weight, context.grid, seen.gram, context.recipe.clip)
                clipped[linear.name] = awq.quantize(weight, context.grid, ratios)
        target = weights(sample.inputs)
        scaled = sample.inputs if scales.shared is None else sample.inputs / scales.shared
        loss = sample.loss(_dequantized(mlp, folded, plain)(scaled), target)
        kept = plain
        if clipped:
            clipped_loss = sample.loss(_dequantized(mlp, folded, clipped)(scaled), target)
            if clipped_loss < loss:
                kept, loss = clipped, clipped_loss
        rtn_loss = sample.loss(self._rounded_to_nearest(mlp, weights)(sample.inputs), target)
        record |= {"clipped": kept is clipped, "loss": loss, "rtn_loss": rtn_loss}
        return kept

    def _rounded_to_nearest(self, mlp: Mlp, weights: GatedWeights) -> GatedWeights:
        """What plain rounding would make of the MLP, the yardstick of every search."""
        gate, up, down = (
            fake_quantize(weight, self.context.grid) if linear.name in self.context.quantized else weight
            for linear, weight in zip(mlp.linears(), (weights.gate, weights.up, weights.down), strict=True)
        )
        return weights.replaced(gate=gate, up=up, down=down)

    def _outputs(self, routed: Assignment, weights: GatedWeights) -> Iterator[tuple[Tensor, Tensor]]:
        """The MLP's weighted output for its tokens, window by window."""
        for start in range(0, len(routed.tokens), WINDOW_TOKENS):
            tokens, factors = (part[start : start + WINDOW_TOKENS] for part in (routed.tokens, routed.weights))
            yield tokens, weights(self._normed(tokens)).mul_(factors.unsqueeze(-1))


def _dequantized(mlp: Mlp, folded: GatedWeights, quantized: dict[str, QTensor]) -> GatedWeights:
    """The MLP as the build computes it, in the folded coordinates."""
    gate, up, down = (
        quantized[linear.name].dequantize() if linear.name in quantized else weight
        for linear, weight in zip(mlp.linears(), (folded.gate, folded.up, folded.down), strict=True)
    )
    return folded.replaced(gate=gate, up=up, down=down)
