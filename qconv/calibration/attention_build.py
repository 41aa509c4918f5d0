"""One build's part in a layer's attention: what is folded, and how the projections are rounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qconv.calibration.forward import AttentionBlock
from qconv.calibration.layer import LayerBuild, LayerContext
from qconv.calibration.rounding import statistics_width
from qconv.calibration.schemes import Compensated
from qconv.calibration.statistics import InputStatistics
from qconv.core.architecture import Linear
from qconv.core.grid import Packed
from qconv.methods import awq
from qconv.models.folding import folded_weight, norm_scale, spread_heads

BlockOf = Callable[[Mapping[str, Tensor]], AttentionBlock]
"""The attention with some projections' weights exchanged, by module name."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What losses are measured on: inputs, and what the unquantized attention and its o make of them.

    Attributes:
        inputs: float32 [sequences, length, hidden], normalized.
        target: The output, of the same shape.
        o_inputs: float32 [sequences, length, heads * head_dim].
    """

    inputs: Tensor
    target: Tensor
    o_inputs: Tensor


class AttentionBuild:
    """One build's attention in one layer.

    Attributes:
        build: The build.
        weights: The quantized projections by name, once they are made.
    """

    def __init__(
        self, context: LayerContext, build: LayerBuild, tensors: Mapping[str, Tensor], norm_weight: Tensor
    ) -> None:
        """Of source tensors by full name, float32, and the input norm's weight."""
        self.context = context
        self.build = build
        self.source_weights = {linear.name: tensors[linear.weight] for linear in context.layer.attention.linears()}
        self.norm_weight = norm_weight
        self.weights: dict[str, Packed] = {}

    def compensates(self, linears: Sequence[Linear]) -> bool:
        """Whether second moments decide about the codes of any of them."""
        return any(self.build.rounding(linear) is not None for linear in linears)

    def width(self, linears: Sequence[Linear]) -> int:
        """See :func:`statistics_width`; 0 where none of them is quantized."""
        wanted = any(linear.name in self.build.quantized for linear in linears)
        return statistics_width(self.build, linears) if wanted else 0

    def see(self, qkv_inputs: InputStatistics, o_inputs: InputStatistics, probe: Probe) -> None:
        """Take the statistics of both inputs, and what losses are measured on."""
        attention = self.context.layer.attention
        self.qkv_inputs, self.o_inputs, self.probe = qkv_inputs, o_inputs, probe
        self.build.keep_squares(qkv_inputs, attention.linears()[:3])
        self.build.keep_squares(o_inputs, (attention.o,))

    def forget_moments(self) -> None:
        """Keep of both inputs' statistics no second moments."""
        self.qkv_inputs, self.o_inputs = self.qkv_inputs.without_moments(), self.o_inputs.without_moments()

    def search_scales(self, block: BlockOf) -> None:
        """Choose what is folded into the input norm and into v."""
        context, build, attention = self.context, self.build, self.context.layer.attention
        points = build.recipe.awq.alpha_points
        if build.searches_scales(attention.linears()[:3]):
            candidates = awq.candidate_scales(self.qkv_inputs.magnitude, points)
            scales = [norm_scale(self.norm_weight, scale) for scale in candidates]
            choice = awq.choose(list(context.workers.map(lambda scale: self._qkv_loss(block, scale), scales)))
            build.report.search(context.layer.input_norm.name, choice)
            if choice.index:
                build.scales[context.layer.input_norm.name] = scales[choice.index]
        if build.searches_scales((attention.v, attention.o)):
            self._search_v_scale(points)

    def _qkv_loss(self, block: BlockOf, scale: Tensor) -> float:
        rounded = {
            linear.name: self.build.schemes[linear.name].nearest(self.source_weights[linear.name] * scale).div_(scale)
            for linear in self.context.layer.attention.linears()[:3]
        }
        return _squared_distance(block(rounded)(self.probe.inputs), self.probe.target)

    def _search_v_scale(self, points: int) -> None:
        """v's output channels feed o alone: dividing v's rows is free, since its groups run along its input."""
        build, attention = self.build, self.context.layer.attention
        repeats, head_dim = build.folds.repeats, build.folds.head_dim
        by_channel = self.o_inputs.magnitude.view(-1, repeats, head_dim).mean(1).reshape(-1)
        scales = awq.candidate_scales(by_channel, points)
        weight, inputs = self.source_weights[attention.o.name], self.probe.o_inputs.flatten(0, 1)
        target = inputs @ weight.t()

        def loss(scale: Tensor) -> float:
            spread = spread_heads(scale, repeats, head_dim)
            return _squared_distance(build.schemes[attention.o.name].linear(inputs / spread, weight, spread), target)

        choice = awq.choose(list(self.context.workers.map(loss, scales)))
        build.report.search(attention.v.name, choice)
        if choice.index:
            build.scales[attention.v.name] = scales[choice.index]

    def folded(self, linears: Sequence[Linear]) -> dict[str, Tensor]:
        """The folded weights of those whose codes second moments decide about, by name."""
        return {linear.name: self._folded(linear) for linear in linears if self.build.rounding(linear) is not None}

    def _folded(self, linear: Linear) -> Tensor:
        folds = self.build.folds
        return folded_weight(self.source_weights[linear.name], folds.input_scale(linear), folds.output_scale(linear))

    def keep(self, results: Mapping[str, Compensated]) -> None:
        """Take projections that second moments have decided about."""
        self.weights |= {name: result.weight for name, result in results.items()}
        self.build.report.compensations.update({name: result.record for name, result in results.items()})

    def round(self, block: BlockOf) -> None:
        """Round the other projections to nearest, with what the method adds to that."""
        self.weights = self._clipped(block) if self.build.static is None else self._with_static_inputs()

    def _with_static_inputs(self) -> dict[str, Packed]:
        """The projections as floats, by name, each with the scale of its input."""
        attention, static = self.context.layer.attention, self.build.static
        assert static is not None
        found: dict[str, Packed] = {}
        for statistics, linears in ((self.qkv_inputs, attention.linears()[:3]), (self.o_inputs, (attention.o,))):
            weights = {one.name: self.source_weights[one.name] for one in linears if one.name in self.build.quantized}
            found |= static.together(weights, statistics.peak)
        return found

    def _clipped(self, block: BlockOf) -> dict[str, Packed]:
        """The projections rounded to nearest by name; v and o with clipping if that helps the block's output.

        q and k are never clipped: their errors meet in a product, which the clipping loss does not see.
        """
        context, attention = self.context, self.context.layer.attention
        quantized = [linear for linear in attention.linears() if linear.name in self.build.quantized]
        linears = [linear for linear in quantized if self.build.rounding(linear) is None]
        rounded = list(context.workers.map(self._round, linears))
        plain = {linear.name: pair[0] for linear, pair in zip(linears, rounded, strict=True)}
        clipped = {linear.name: pair[1] for linear, pair in zip(linears, rounded, strict=True) if pair[1] is not None}
        if not clipped:
            return plain
        without, with_clip = self._output_loss(block, plain), self._output_loss(block, {**plain, **clipped})
        self.build.report.searches[f"{attention.o.name}.clip"] = {
            "loss": min(without, with_clip),
            "rtn_loss": without,
            "kept_rtn": not with_clip < without,
        }
        return {**plain, **clipped} if with_clip < without else plain

    def _round(self, linear: Linear) -> tuple[Packed, Packed | None]:
        """A projection quantized without clipping, and with it where clipping is searched."""
        attention, folds = self.context.layer.attention, self.build.folds
        in_scale = folds.input_scale(linear)
        weight = self._folded(linear)
        scheme = self.build.schemes[linear.name]
        plain = scheme.round(weight)
        if linear not in (attention.v, attention.o):
            return plain, None
        inputs = self.o_inputs if linear == attention.o else self.qkv_inputs
        seen = inputs if in_scale is None else inputs.rescaled(in_scale)
        return plain, scheme.clipped(weight, seen.diagonal(scheme.gram_width(linear.in_features)))

    def _output_loss(self, block: BlockOf, weights: Mapping[str, Packed]) -> float:
        return _squared_distance(block(self._effective(weights))(self.probe.inputs), self.probe.target)

    def effective(self) -> dict[str, Tensor]:
        """The quantized projections by name with the folded scales taken out again, so that inputs stay the same."""
        return self._effective(self.weights)

    def _effective(self, weights: Mapping[str, Packed]) -> dict[str, Tensor]:
        folds, effective = self.build.folds, {}
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


def _squared_distance(output: Tensor, target: Tensor) -> float:
    return float(torch.linalg.vector_norm(output - target)) ** 2
