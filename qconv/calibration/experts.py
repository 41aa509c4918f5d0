"""The MLP half of a layer: every expert streamed through with the tokens that the router sends it.

Two passes over the experts' weights. The first measures, for each candidate scale of the post-attention norm, the loss
summed over all experts, since they and the router share that one scale. The second calibrates, quantizes and applies the
experts one by one. Nothing is ever held for more than one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qconv.calibration.layer import Finished, LayerContext
from qconv.calibration.mlp import GatedWeights
from qconv.calibration.routing import Assignment, Routing
from qconv.calibration.statistics import InputStatistics, block_width
from qconv.folding import norm_scale
from qconv.methods import awq
from qconv.methods.base import fake_quantize
from qconv.models.base import Mlp, Moe
from qconv.qtensor import QTensor

WINDOW_TOKENS = 4096
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
    for index, mlp in enumerate(context.layer.mlps()):
        yield from half.quantize(index, mlp)


@dataclass(frozen=True, slots=True)
class _Sample:
    """Inputs on which losses are measured, float32 [n, hidden], and the weight of each token's squared error, [n]."""

    inputs: Tensor
    weights: Tensor

    def loss(self, output: Tensor, target: Tensor) -> float:
        return float(((output - target).square_().sum(-1) * self.weights).sum(dtype=torch.float64))


class _MlpHalf:
    def __init__(self, context: LayerContext) -> None:
        self.context = context
        norm = context.layer.post_attention_norm
        self.norm_weight = context.source.read(norm.weight).float()
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
        losses = torch.zeros(len(scales), dtype=torch.float64)
        for index, mlp in enumerate(mlps):
            weights = GatedWeights.read(context.source, mlp, context.decoder.act)
            sample = self._sample(index, self._calibration_tokens(index), size)
            target = weights(sample.inputs)
            for number, scale in enumerate(scales):
                rounded = weights.replaced(
                    gate=fake_quantize(weights.gate * scale, context.grid),
                    up=fake_quantize(weights.up * scale, context.grid),
                )
                losses[number] += sample.loss(rounded(sample.inputs / scale), target)
        choice = awq.choose(losses)
        context.report.search(context.layer.post_attention_norm.name, choice)
        if choice.index:
            context.scales[context.layer.post_attention_norm.name] = scales[choice.index]

    def quantize(self, index: int, mlp: Mlp) -> Iterator[Finished]:
        """Calibrate and quantize one MLP, then add its output for the tokens that it sees."""
        context = self.context
        weights = GatedWeights.read(context.source, mlp, context.decoder.act)
        assignment = self._calibration_tokens(index)
        inputs, inner = self._statistics(weights, assignment)
        sample = self._sample(index, assignment, context.recipe.awq.search_tokens)
        record: dict[str, object] = {
            "module": mlp.gate.name.rpartition(".")[0],
            "tokens": len(self.routing.assignment(index).tokens),
            "calibration_tokens": len(assignment.tokens),
            "shrinkage": round(self.shrinkage / max(len(assignment.tokens) + self.shrinkage, 1), 6),
        }
        if context.all_quantized((mlp.up, mlp.down)):
            self._search_inner_scale(mlp, weights, inner, sample, record)
        folded = self._folded(mlp, weights)
        quantized, losses = self._round(mlp, weights, folded, (inputs, inner), sample)
        record |= losses
        context.report.experts.append(record)
        for linear in mlp.linears():
            weight = quantized.get(linear.name)
            yield context.dense(linear) if weight is None else context.packed(linear, weight)
        if not context.is_last:
            propagate = context.recipe.calibration.propagate
            self._pass_on(index, self._effective(mlp, folded, quantized) if propagate else weights)

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
        self, mlp: Mlp, weights: GatedWeights, inner: InputStatistics, sample: _Sample, record: dict[str, object]
    ) -> None:
        """up's output feeds down alone: dividing up's rows is free, since its groups run along its input."""
        context = self.context
        scales = awq.candidate_scales(inner.magnitude, context.recipe.awq.alpha_points)
        activations = weights.inner(sample.inputs)
        target = activations @ weights.down.t()
        losses = []
        for scale in scales:
            rounded = fake_quantize(weights.down * scale, context.grid)
            losses.append(sample.loss((activations / scale) @ rounded.t(), target))
        choice = awq.choose(torch.tensor(losses, dtype=torch.float64))
        record |= {"alpha": round(choice.alpha, 4), "kept_rtn": choice.index == 0}
        if choice.index:
            context.scales[mlp.up.name] = scales[choice.index]

    def _folded(self, mlp: Mlp, weights: GatedWeights) -> GatedWeights:
        """The weights in the folded coordinates; their input is the norm's folded output."""
        folds = self.context.folds
        shared, inner = folds.input_scale(mlp.up), folds.output_scale(mlp.up)
        gate, up, down, up_bias = weights.gate, weights.up, weights.down, weights.up_bias
        if shared is not None:
            gate, up = gate * shared, up * shared
        if inner is not None:
            up, down = up / inner.unsqueeze(-1), down * inner
            up_bias = None if up_bias is None else up_bias / inner
        return weights.replaced(gate=gate, up=up, down=down, up_bias=up_bias)

    def _round(
        self,
        mlp: Mlp,
        weights: GatedWeights,
        folded: GatedWeights,
        statistics: tuple[InputStatistics, InputStatistics],
        sample: _Sample,
    ) -> tuple[dict[str, QTensor], dict[str, object]]:
        """Quantize the folded weights, with clipping where that helps the MLP's output; and what it cost."""
        context, folds = self.context, self.context.folds
        plain: dict[str, QTensor] = {}
        clipped: dict[str, QTensor] = {}
        inputs, inner = statistics
        for linear, weight, seen in zip(
            mlp.linears(), (folded.gate, folded.up, folded.down), (inputs, inputs, inner), strict=True
        ):
            if linear.name not in context.quantized:
                continue
            plain[linear.name] = awq.quantize(weight, context.grid, None)
            if context.recipe.searches_clipping:
                scale = folds.input_scale(linear)
                gram = (seen if scale is None else seen.rescaled(scale)).gram
                ratios = awq.output_clip_ratios(weight, context.grid, gram, context.recipe.clip)
                clipped[linear.name] = awq.quantize(weight, context.grid, ratios)
        target = weights(sample.inputs)
        shared = folds.input_scale(mlp.up)
        scaled = sample.inputs if shared is None else sample.inputs / shared
        rtn = weights.replaced(
            gate=self._rounded_or_same(mlp.gate.name, weights.gate),
            up=self._rounded_or_same(mlp.up.name, weights.up),
            down=self._rounded_or_same(mlp.down.name, weights.down),
        )
        rtn_loss = sample.loss(rtn(sample.inputs), target)
        loss = sample.loss(self._effective(mlp, folded, plain, scaled=False)(scaled), target)
        kept = plain
        if clipped:
            clipped_loss = sample.loss(self._effective(mlp, folded, clipped, scaled=False)(scaled), target)
            if clipped_loss < loss:
                kept, loss = clipped, clipped_loss
        return kept, {"clipped": kept is clipped, "loss": loss, "rtn_loss": rtn_loss}

    def _rounded_or_same(self, name: str, weight: Tensor) -> Tensor:
        return fake_quantize(weight, self.context.grid) if name in self.context.quantized else weight

    def _effective(
        self, mlp: Mlp, folded: GatedWeights, quantized: dict[str, QTensor], *, scaled: bool = True
    ) -> GatedWeights:
        """The MLP as the build computes it; with ``scaled`` its input is the unfolded norm's output."""
        shared = self.context.folds.input_scale(mlp.up) if scaled else None

        def dense(name: str, weight: Tensor) -> Tensor:
            return quantized[name].dequantize() if name in quantized else weight

        gate, up = dense(mlp.gate.name, folded.gate), dense(mlp.up.name, folded.up)
        if shared is not None:
            gate, up = gate / shared, up / shared
        return folded.replaced(gate=gate, up=up, down=dense(mlp.down.name, folded.down))

    def _pass_on(self, index: int, weights: GatedWeights) -> None:
        routed = self.routing.assignment(index)
        for start in range(0, len(routed.tokens), WINDOW_TOKENS):
            tokens, factors = (part[start : start + WINDOW_TOKENS] for part in (routed.tokens, routed.weights))
            self.context.work.total.add(tokens, weights(self._normed(tokens)).mul_(factors.unsqueeze(-1)))
