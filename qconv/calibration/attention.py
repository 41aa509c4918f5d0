"""The attention half of a layer: statistics of q, k, v and o, scale searches, quantization, and the pass onward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from qconv.calibration.forward import AttentionBlock
from qconv.calibration.layer import Finished, LayerContext, Workspace
from qconv.calibration.rounding import compensate, statistics_width
from qconv.calibration.schemes import Compensated, StaticScheme
from qconv.calibration.statistics import InputStatistics
from qconv.core.architecture import Linear, Norm
from qconv.core.grid import Packed
from qconv.methods import awq
from qconv.models.folding import folded_weight, norm_scale, spread_heads

WINDOW_TOKENS = 2048
PROBE_SEQUENCES = 4
Made = TypeVar("Made")


def calibrate_attention(context: LayerContext) -> Iterator[Finished]:
    """Quantize the attention of a layer and write the layer's middle activations.

    Yields the modules in the order of the plan: input norm, q, k, v, o, head norms.
    """
    half = _AttentionHalf(context)
    half.collect()
    if context.recipe.searches_scales:
        half.search_scales()
    if context.static is not None:
        weights = half.with_static_inputs(context.static)
    else:
        weights = half.compensated() if context.recipe.rounding is not None else half.clipped()
    attention = context.layer.attention
    yield context.dense(context.layer.input_norm)
    for linear in attention.linears():
        yield context.finished(linear, weights.get(linear.name))
    for norm in attention.head_norms:
        yield context.dense(norm)
    half.pass_on(weights)


class _AttentionHalf:
    def __init__(self, context: LayerContext) -> None:
        self.context = context
        self.reference = context.work.reference
        layer, source = context.layer, context.source
        modules: tuple[Linear | Norm, ...] = (
            *layer.attention.linears(),
            *layer.attention.head_norms,
            layer.input_norm,
        )
        tensors = {name: source.read(name).float() for module in modules for name, _ in module.tensors()}
        self.tensors = tensors
        self.weights = {linear.name: tensors[linear.weight] for linear in layer.attention.linears()}
        self.norm_weight = source.read(layer.input_norm.weight)
        self.norm = context.decoder.norm(layer, layer.input_norm, self.norm_weight)
        self.block: AttentionBlock = context.decoder.attention(layer, tensors)
        self.qkv_inputs = self._statistics(layer.attention.linears()[:3])
        self.o_inputs = self._statistics((layer.attention.o,))

    def _statistics(self, linears: Sequence[Linear]) -> InputStatistics:
        wanted = any(linear.name in self.context.quantized for linear in linears)
        width = statistics_width(self.context, linears) if wanted else 0
        return InputStatistics.empty(linears[0].in_features, width, drift=bool(width) and self.reference is not None)

    def _normed(self, start: int, stop: int, work: Workspace | None = None) -> tuple[Tensor, Tensor]:
        """The residual stream [tokens, hidden] and its norm [sequences, length, hidden]; of the quantized model."""
        hidden = (work or self.context.work).inputs.read(start, stop)
        normed: Tensor = self.norm(hidden)
        return hidden, normed.view(-1, self.context.work.sequence_length, hidden.shape[-1])

    def _block(self, replaced: Mapping[str, Tensor]) -> AttentionBlock:
        """The attention with some projections' weights exchanged, by module name."""
        exchanged = {f"{name}.weight": weight for name, weight in replaced.items()}
        return self.context.decoder.attention(self.context.layer, {**self.tensors, **exchanged})

    def collect(self) -> None:
        """Statistics of both inputs over all tokens; the probe on which losses are measured."""

        def inputs(window: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor | None]:
            _, normed = self._normed(*window)
            _, o_input = self.block.with_o_input(normed)
            unquantized = None if self.reference is None else self._normed(*window, self.reference)[1].flatten(0, 1)
            return normed.flatten(0, 1), o_input.flatten(0, 1), unquantized

        for normed, o_input, unquantized in self._windows(inputs):
            self.qkv_inputs.update(normed, reference=unquantized)
            self.o_inputs.update(o_input)
        attention = self.context.layer.attention
        self.context.keep_squares(self.qkv_inputs, attention.linears()[:3])
        self.context.keep_squares(self.o_inputs, (attention.o,))
        self.probe = self._probe()
        self.target, self.o_probe = self.block.with_o_input(self.probe)

    def _collect_o(self, weights: Mapping[str, Packed], reference: Workspace) -> None:
        """Statistics of o's input anew: what the quantized q, k and v make of it, beside the unquantized model's."""
        block = self._block(self._effective(weights))

        def inputs(window: tuple[int, int]) -> tuple[Tensor, Tensor]:
            _, o_input = block.with_o_input(self._normed(*window)[1])
            _, unquantized = self.block.with_o_input(self._normed(*window, reference)[1])
            return o_input.flatten(0, 1), unquantized.flatten(0, 1)

        self.o_inputs = self._statistics((self.context.layer.attention.o,))
        for o_input, unquantized in self._windows(inputs):
            self.o_inputs.update(o_input, reference=unquantized)

    def _windows(self, work: Callable[[tuple[int, int]], Made]) -> Iterator[Made]:
        """What comes of each window of whole sequences, in their order."""
        return self.context.workers.map(work, self.context.work.sequence_windows(WINDOW_TOKENS))

    def _probe(self) -> Tensor:
        """The first positions of a few sequences spread over the corpus; causal attention makes a prefix exact."""
        work, wanted = self.context.work, 4 * self.context.recipe.awq.search_tokens
        sequences = work.tokens // work.sequence_length
        count = min(PROBE_SEQUENCES, sequences)
        length = min(work.sequence_length, -(-wanted // count))
        picks = [sequences * index // count for index in range(count)]
        rows = [work.inputs.read(pick * work.sequence_length, pick * work.sequence_length + length) for pick in picks]
        normed: Tensor = self.norm(torch.stack(rows))
        return normed

    def search_scales(self) -> None:
        """Choose what is folded into the input norm and into v."""
        context, attention = self.context, self.context.layer.attention
        points = context.recipe.awq.alpha_points
        if context.all_quantized(attention.linears()[:3]):
            candidates = awq.candidate_scales(self.qkv_inputs.magnitude, points)
            scales = [norm_scale(self.norm_weight, scale) for scale in candidates]
            choice = awq.choose(list(context.workers.map(self._qkv_loss, scales)))
            context.report.search(context.layer.input_norm.name, choice)
            if choice.index:
                context.scales[context.layer.input_norm.name] = scales[choice.index]
        if context.all_quantized((attention.v, attention.o)):
            self._search_v_scale(points)

    def _qkv_loss(self, scale: Tensor) -> float:
        rounded = {
            linear.name: self.context.schemes[linear.name].nearest(self.weights[linear.name] * scale).div_(scale)
            for linear in self.context.layer.attention.linears()[:3]
        }
        return _squared_distance(self._block(rounded)(self.probe), self.target)

    def _search_v_scale(self, points: int) -> None:
        """v's output channels feed o alone: dividing v's rows is free, since its groups run along its input."""
        context, attention = self.context, self.context.layer.attention
        repeats, head_dim = context.folds.repeats, context.folds.head_dim
        by_channel = self.o_inputs.magnitude.view(-1, repeats, head_dim).mean(1).reshape(-1)
        scales = awq.candidate_scales(by_channel, points)
        weight, inputs = self.weights[attention.o.name], self.o_probe.flatten(0, 1)
        target = inputs @ weight.t()

        def loss(scale: Tensor) -> float:
            spread = spread_heads(scale, repeats, head_dim)
            return _squared_distance(context.schemes[attention.o.name].linear(inputs / spread, weight, spread), target)

        choice = awq.choose(list(context.workers.map(loss, scales)))
        context.report.search(attention.v.name, choice)
        if choice.index:
            context.scales[attention.v.name] = scales[choice.index]

    def compensated(self) -> dict[str, Packed]:
        """The projections quantized by GPTQ, by name; q, k and v share one Hessian."""
        context, attention = self.context, self.context.layer.attention

        def solve(part: tuple[InputStatistics, Sequence[Linear]]) -> dict[str, Compensated]:
            statistics, linears = part
            scale = context.folds.input_scale(linears[0])
            seen = statistics if scale is None else statistics.rescaled(scale)
            weights = {linear.name: self._folded(linear) for linear in linears if linear.name in context.quantized}
            return compensate(context, seen, weights)

        qkv, found = (self.qkv_inputs, attention.linears()[:3]), dict[str, Compensated]()
        if self.reference is None:
            for results in context.workers.map(solve, ((self.o_inputs, (attention.o,)), qkv)):
                found |= results
        else:
            found = solve(qkv)
            self._collect_o({name: result.weight for name, result in found.items()}, self.reference)
            found |= solve((self.o_inputs, (attention.o,)))
        for linear in attention.linears():
            if linear.name in found:
                context.report.compensations[linear.name] = found[linear.name].record
        return {name: result.weight for name, result in found.items()}

    def with_static_inputs(self, static: StaticScheme) -> dict[str, Packed]:
        """The projections as floats, by name, each with the scale of its input."""
        context, attention = self.context, self.context.layer.attention
        found: dict[str, Packed] = {}
        for statistics, linears in ((self.qkv_inputs, attention.linears()[:3]), (self.o_inputs, (attention.o,))):
            weights = {one.name: self.weights[one.name] for one in linears if one.name in context.quantized}
            found |= static.together(weights, statistics.peak)
        return found

    def _folded(self, linear: Linear) -> Tensor:
        folds = self.context.folds
        return folded_weight(self.weights[linear.name], folds.input_scale(linear), folds.output_scale(linear))

    def clipped(self) -> dict[str, Packed]:
        """The projections rounded to nearest by name; v and o with clipping if that helps the block's output.

        q and k are never clipped: their errors meet in a product, which the clipping loss does not see.
        """
        context, attention = self.context, self.context.layer.attention
        linears = [linear for linear in attention.linears() if linear.name in context.quantized]
        rounded = list(context.workers.map(self._round, linears))
        plain = {linear.name: pair[0] for linear, pair in zip(linears, rounded, strict=True)}
        clipped = {linear.name: pair[1] for linear, pair in zip(linears, rounded, strict=True) if pair[1] is not None}
        if not clipped:
            return plain
        without, with_clip = self._output_loss(plain), self._output_loss({**plain, **clipped})
        self.context.report.searches[f"{attention.o.name}.clip"] = {
            "loss": min(without, with_clip),
            "rtn_loss": without,
            "kept_rtn": not with_clip < without,
        }
        return {**plain, **clipped} if with_clip < without else plain

    def _round(self, linear: Linear) -> tuple[Packed, Packed | None]:
        """A projection quantized without clipping, and with it where clipping is searched."""
        context, attention, folds = self.context, self.context.layer.attention, self.context.folds
        in_scale = folds.input_scale(linear)
        weight = self._folded(linear)
        scheme = context.schemes[linear.name]
        plain = scheme.round(weight)
        if linear not in (attention.v, attention.o):
            return plain, None
        inputs = self.o_inputs if linear == attention.o else self.qkv_inputs
        gram = (inputs if in_scale is None else inputs.rescaled(in_scale)).gram
        return plain, scheme.clipped(weight, gram)

    def _output_loss(self, weights: Mapping[str, Packed]) -> float:
        return _squared_distance(self._block(self._effective(weights))(self.probe), self.target)

    def _effective(self, weights: Mapping[str, Packed]) -> dict[str, Tensor]:
        """Quantized weights by module name with the folded scales taken out again, so that inputs stay the same."""
        folds, effective = self.context.folds, {}
        for linear in self.context.layer.attention.linears():
            if linear.name in weights:
                dense = weights[linear.name].dequantize()
                in_scale, out_scale = folds.input_scale(linear), folds.output_scale(linear)
                if in_scale is not None:
                    dense.div_(in_scale)
                if out_scale is not None:
                    dense.mul_(out_scale.unsqueeze(-1))
                effective[linear.name] = dense
        return effective

    def pass_on(self, weights: Mapping[str, Packed]) -> None:
        """Write the residual stream after attention, through the quantized weights where the recipe propagates."""
        propagate = self.context.recipe.calibration.propagate
        block = self._block(self._effective(weights)) if propagate else self.block
        for work, attention in ((self.context.work, block), (self.reference, self.block)):
            if work is not None:
                self._attend(work, attention)

    def _attend(self, work: Workspace, block: AttentionBlock) -> None:
        def attend(window: tuple[int, int]) -> None:
            hidden, normed = self._normed(*window, work)
            hidden.add_(block(normed).view_as(hidden))
            work.middle.write(window[0], hidden)
            work.total.write(window[0], hidden)

        for _ in self._windows(attend):
            pass


def _squared_distance(output: Tensor, target: Tensor) -> float:
    return float(torch.linalg.vector_norm(output - target)) ** 2
