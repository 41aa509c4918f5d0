"""The MLP half of a layer: every expert streamed through with the tokens that the router sends it.

Two passes over the experts' weights. The first measures for each candidate scale of the post-attention norm the loss
summed over all experts, since they and the router share that one scale. The second calibrates, quantizes and applies
the experts one by one. Each worker thread holds one expert, and nothing is held for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qconv.calibration.activations import SetAside
from qconv.calibration.layer import Finished, LayerContext, Workspace
from qconv.calibration.mlp import FoldedScales, GatedWeights, dequantized
from qconv.calibration.rounding import compensate, statistics_width
from qconv.calibration.routing import Assignment, Routing
from qconv.calibration.schemes import Compensated
from qconv.calibration.statistics import InputStatistics
from qconv.core.architecture import Linear, Mlp, Moe
from qconv.core.grid import Packed
from qconv.methods import awq
from qconv.models.folding import norm_scale

WINDOW_TOKENS = 2048
POOL_TOKENS = 256
"""Tokens of the layer as a whole that stand in for an expert's missing ones."""
SHARED_SEARCH_TOKENS = 4096
"""Tokens on which the shared scale's loss is measured, spread over the layer's experts."""


def calibrate_mlps(context: LayerContext) -> Iterator[Finished]:
    """Quantize the MLPs of a layer and add their outputs to the layer's running output.

    Yields the modules in the order of the plan: post-attention norm, routers, then each MLP's gate, up and down.
    """
    half = _MlpHalf(context)
    if context.recipe.searches_scales:
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
class _Subject:
    """An MLP at work: source weights, the tokens of its statistics, the sample of its losses, the output on that."""

    mlp: Mlp
    weights: GatedWeights
    assignment: Assignment
    sample: _Sample
    target: Tensor


@dataclass(frozen=True, slots=True)
class _Result:
    """A calibrated MLP.

    Attributes:
        weights: Its quantized weights by module name.
        inner_scale: What was folded into up.
        record: For the report.
        compensations: The same by linear, where GPTQ rounded it.
        passing: What computes the outputs that the next layer sees, from the unfolded norm's output; None without one.
        source: The source's weights, where the unquantized model's outputs go along.
    """

    weights: dict[str, Packed]
    inner_scale: Tensor | None
    record: dict[str, Any]
    compensations: dict[str, dict[str, Any]]
    passing: GatedWeights | None
    source: GatedWeights | None = None


class _MlpHalf:
    def __init__(self, context: LayerContext) -> None:
        self.context = context
        norm = context.layer.post_attention_norm
        self.norm_weight = context.source.read(norm.weight)
        self.norm = context.decoder.norm(context.layer, norm, self.norm_weight)
        self.routing = self._routing(context.work)
        self.reference = context.work.reference
        self.reference_routing: Routing | None = None
        if self.reference is not None and not context.is_last:
            self.reference_routing = self._routing(self.reference)
        self.shrinkage = context.recipe.calibration.shrinkage_tokens
        hidden = context.model.hidden_size
        self.layer_inputs = InputStatistics.empty(hidden, statistics_width(context, self._readers()))
        for start, stop in context.work.middle.windows(WINDOW_TOKENS):
            self.layer_inputs.update(self.norm(context.work.middle.read(start, stop)))
        context.keep_squares(self.layer_inputs, context.layer.routers())
        count = min(POOL_TOKENS, context.work.tokens)
        picks = torch.randperm(context.work.tokens, generator=context.generator(0))[:count].sort().values
        self.pool = self._normed(picks)

    def _routing(self, work: Workspace) -> Routing:
        return Routing(self.context.source, self.context.decoder, self.context.layer, work, self.norm)

    def _readers(self) -> list[Linear]:
        """The linears that read the normed stream."""
        return [linear for mlp in self.context.layer.mlps() for linear in (mlp.gate, mlp.up)]

    def _normed(self, tokens: Tensor, work: Workspace | None = None) -> Tensor:
        """The MLPs' inputs for chosen tokens, float32 [n, hidden]; in the quantized model."""
        normed: Tensor = self.norm((work or self.context.work).middle.gather(tokens))
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
            schemes = context.schemes[mlps[index].gate.name], context.schemes[mlps[index].up.name]
            found = []
            for scale in scales:
                inner = weights.rounded_inner(sample.inputs, schemes, scale)
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
        for mlp, (result, outputs) in zip(mlps, context.workers.map(self._make, range(len(mlps))), strict=True):
            if result.inner_scale is not None:
                context.scales[mlp.up.name] = result.inner_scale
            context.report.experts.append(result.record)
            context.report.compensations |= result.compensations
            for linear in mlp.linears():
                yield context.finished(linear, result.weights.get(linear.name))
            # In the order of the experts, so that sums come out the same however the threads ran.
            for work, set_aside in zip((context.work, self.reference), outputs, strict=False):
                for tokens, output in set_aside:
                    assert work is not None
                    work.total.add(tokens, output)

    def _make(self, index: int) -> tuple[_Result, list[SetAside]]:
        """A quantized MLP, and its weighted outputs for the tokens that the router sends it where a layer follows.

        The outputs are computed when all that quantizing needed is released, so that both peak alike.
        """
        result = self._quantize(index)
        if result.passing is None:
            return result, []
        total = self.context.work.total
        passed = [self._outputs(self.context.work, self.routing.assignment(index), result.passing)]
        if result.source is not None and self.reference is not None and self.reference_routing is not None:
            passed.append(self._outputs(self.reference, self.reference_routing.assignment(index), result.source))
        outputs = [SetAside(total.path.parent, total.width, one) for one in passed]
        return replace(result, passing=None, source=None), outputs

    def _quantize(self, index: int) -> _Result:
        context, mlp, recipe = self.context, self.context.layer.mlps()[index], self.context.recipe
        weights = GatedWeights.read(context.source, mlp, context.decoder.act)
        assignment, routed = self._calibration_tokens(index), self.routing.assignment(index)
        sample = self._sample(index, assignment, context.recipe.awq.search_tokens)
        subject = _Subject(mlp, weights, assignment, sample, weights(sample.inputs))
        record: dict[str, Any] = {
            "module": mlp.gate.name.rpartition(".")[0],
            "tokens": len(routed.tokens),
            "calibration_tokens": len(assignment.tokens),
            "shrinkage": round(self.shrinkage / max(len(assignment.tokens) + self.shrinkage, 1), 6),
        }
        scales = FoldedScales(context.folds.input_scale(mlp.up), None)
        inner = self._inner_statistics(subject, weights, self._clip_width(mlp)) if recipe.searches_scales else None
        if inner is not None and context.all_quantized((mlp.up, mlp.down)):
            scales = replace(scales, inner=self._search_inner_scale(subject, inner.magnitude, record))
        folded = scales.fold(weights)
        results: dict[str, Compensated] = {}
        if recipe.rounding is not None:
            results = self._compensated(subject, folded, scales)
            quantized = {name: result.weight for name, result in results.items()}
        elif inner is not None:
            quantized = self._clipped(subject, folded, scales, inner, record)
        else:
            quantized = self._with_static_inputs(subject)
        loss = _loss(subject, folded, scales, quantized)
        record |= {"loss": loss, "rtn_loss": loss if context.static is not None else self._rtn_loss(subject)}
        passing: GatedWeights | None = None
        if not context.is_last:
            propagate = context.recipe.calibration.propagate
            passing = scales.unfold_input(dequantized(mlp, folded, quantized)) if propagate else weights
        compensations = {name: result.record for name, result in results.items()}
        source = None if self.reference_routing is None else weights
        return _Result(quantized, scales.inner, record, compensations, passing, source)

    def _clip_width(self, mlp: Mlp) -> int:
        """The width of the second moments that clipping down needs; 0 where GPTQ follows, which collects its own."""
        return 0 if self.context.recipe.rounding is not None else statistics_width(self.context, (mlp.down,))

    def _input_statistics(self, mlp: Mlp, assignment: Assignment) -> InputStatistics:
        """Statistics of gate's and up's input, shrunk toward the layer's."""
        hidden = self.context.model.hidden_size
        width = statistics_width(self.context, self._readers())
        statistics = InputStatistics.empty(hidden, width, drift=self._drifts(width))
        for normed, counts, unquantized in self._windows(assignment):
            statistics.update(normed, counts, unquantized)
        self.context.keep_squares(statistics, (mlp.gate, mlp.up))
        return statistics.shrunk(self.layer_inputs, float(self.shrinkage))

    def _drifts(self, width: int) -> bool:
        """Whether inputs are compared with the unquantized model's."""
        return bool(width) and self.reference is not None

    def _inner_statistics(self, subject: _Subject, weights: GatedWeights, width: int) -> InputStatistics:
        """Statistics of down's input, second moments in blocks of ``width``, shrunk toward those of the layer's pool.

        Args:
            subject: Whose.
            weights: What computes it from the unfolded norm's output.
            width: See :class:`InputStatistics`.
        """
        in_features = weights.down.shape[1]
        pooled = InputStatistics.empty(in_features, width)
        inner = InputStatistics.empty(in_features, width, drift=self._drifts(width))
        for normed, counts, unquantized in self._windows(subject.assignment):
            reference = None if unquantized is None else subject.weights.inner(unquantized)
            inner.update(weights.inner(normed), counts, reference)
        pooled.update(weights.inner(self.pool))
        self.context.keep_squares(inner, (subject.mlp.down,))
        return inner.shrunk(pooled, float(self.shrinkage))

    def _windows(self, assignment: Assignment) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
        """An MLP's inputs, float32 [n, hidden], what each token counts, float32 [n] or None for 1, and the unquantized
        model's inputs, where they are compared.
        """
        counts: Tensor | None = None
        if self.context.recipe.calibration.token_weights == "router" and len(assignment.weights):
            squares = assignment.weights.square()
            counts = squares / squares.mean()
        for start in range(0, len(assignment.tokens), WINDOW_TOKENS):
            stop = start + WINDOW_TOKENS
            tokens = assignment.tokens[start:stop]
            unquantized = None if self.reference is None else self._normed(tokens, self.reference)
            yield self._normed(tokens), None if counts is None else counts[start:stop], unquantized

    def _search_inner_scale(self, subject: _Subject, magnitude: Tensor, record: dict[str, Any]) -> Tensor | None:
        """up's output feeds down alone: dividing up's rows is free, since its groups run along its input."""
        scales = awq.candidate_scales(magnitude, self.context.recipe.awq.alpha_points)
        down, sample = subject.weights.down, subject.sample
        activations = subject.weights.inner(sample.inputs)
        target = activations @ down.t()
        scheme, losses = self.context.schemes[subject.mlp.down.name], []
        for scale in scales:
            losses.append(sample.loss(scheme.linear(activations / scale, down, scale), target))
        choice = awq.choose(losses)
        record |= {"alpha": round(choice.alpha, 4), "kept_rtn": choice.index == 0}
        return scales[choice.index] if choice.index else None

    def _compensated(self, subject: _Subject, folded: GatedWeights, scales: FoldedScales) -> dict[str, Compensated]:
        """Quantize by GPTQ: gate and up, which share a Hessian, then down on what the quantized two pass to it."""
        context, mlp = self.context, subject.mlp
        pair = {linear.name: weight for linear, weight in ((mlp.gate, folded.gate), (mlp.up, folded.up))}
        results: dict[str, Compensated] = {}
        pair = {name: weight for name, weight in pair.items() if name in context.quantized}
        if pair:
            inputs = self._input_statistics(subject.mlp, subject.assignment)
            results = compensate(context, inputs if scales.shared is None else inputs.rescaled(scales.shared), pair)
        if context.all_quantized((mlp.down,)):
            quantized = {name: result.weight for name, result in results.items()}
            passing = scales.unfold_input(dequantized(mlp, folded, quantized))
            inner = self._inner_statistics(subject, passing, folded.down.shape[1])
            results |= compensate(context, inner, {mlp.down.name: folded.down})
        return results

    def _with_static_inputs(self, subject: _Subject) -> dict[str, Packed]:
        """The weights as floats; one scale for the inputs of all gates and ups of the layer, as engines want it."""
        context, mlp = self.context, subject.mlp
        inner = self._inner_statistics(subject, subject.weights, 0)
        parts = (
            (self.layer_inputs.peak, {mlp.gate: subject.weights.gate, mlp.up: subject.weights.up}),
            (inner.peak, {mlp.down: subject.weights.down}),
        )
        static, found = self.context.static, dict[str, Packed]()
        assert static is not None
        for peak, weights in parts:
            wanted = {linear.name: weight for linear, weight in weights.items() if linear.name in context.quantized}
            found |= static.together(wanted, peak)
        return found

    def _clipped(
        self,
        subject: _Subject,
        folded: GatedWeights,
        scales: FoldedScales,
        inner: InputStatistics,
        record: dict[str, Any],
    ) -> dict[str, Packed]:
        """Round the folded weights to nearest, with clipping where that helps the MLP's output."""
        context, mlp = self.context, subject.mlp
        plain: dict[str, Packed] = {}
        clipped: dict[str, Packed] = {}
        inputs = self._input_statistics(subject.mlp, subject.assignment)
        if scales.shared is not None:
            inputs = inputs.rescaled(scales.shared)
        if scales.inner is not None:
            inner = inner.rescaled(scales.inner)
        seen_by = (inputs, inputs, inner)
        for linear, weight, seen in zip(mlp.linears(), (folded.gate, folded.up, folded.down), seen_by, strict=True):
            if linear.name not in context.quantized:
                continue
            scheme = context.schemes[linear.name]
            plain[linear.name] = scheme.round(weight)
            found = scheme.clipped(weight, seen.gram)
            if found is not None:
                clipped[linear.name] = found
        clipped = {**plain, **clipped} if clipped else {}
        losses = [_loss(subject, folded, scales, weights) for weights in (plain, clipped) if weights]
        record["clipped"] = len(losses) == 2 and losses[1] < losses[0]
        return clipped if record["clipped"] else plain

    def _rtn_loss(self, subject: _Subject) -> float:
        """What plain rounding of the MLP would cost, the yardstick of every method."""
        mlp, weights = subject.mlp, subject.weights
        gate, up, down = (
            self.context.schemes[linear.name].nearest(weight) if linear.name in self.context.quantized else weight
            for linear, weight in zip(mlp.linears(), (weights.gate, weights.up, weights.down), strict=True)
        )
        rounded = weights.replaced(gate=gate, up=up, down=down)
        return subject.sample.loss(rounded(subject.sample.inputs), subject.target)

    def _outputs(self, work: Workspace, routed: Assignment, weights: GatedWeights) -> Iterator[tuple[Tensor, Tensor]]:
        """The MLP's weighted output for its tokens, window by window."""
        for start in range(0, len(routed.tokens), WINDOW_TOKENS):
            tokens, factors = (part[start : start + WINDOW_TOKENS] for part in (routed.tokens, routed.weights))
            yield tokens, weights(self._normed(tokens, work)).mul_(factors.unsqueeze(-1))


def _loss(subject: _Subject, folded: GatedWeights, scales: FoldedScales, quantized: Mapping[str, Packed]) -> float:
    """The weighted squared error of an MLP's output on its sample."""
    sample = subject.sample
    inputs = sample.inputs if scales.shared is None else sample.inputs / scales.shared
    return sample.loss(dequantized(subject.mlp, folded, quantized)(inputs), subject.target)
