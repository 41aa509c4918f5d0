"""One build's part in a layer's attention: what is folded, and how the projections are rounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qconv.calibration.forward import MixerBlock
from qconv.calibration.layer import LayerBuild, LayerContext
from qconv.calibration.placement import at_home
from qconv.calibration.rounding import statistics_width
from qconv.calibration.schemes import Compensated, dense, placed
from qconv.calibration.statistics import InputStatistics
from qconv.core.architecture import InputGroup, Linear, Norm
from qconv.core.grid import Packed
from qconv.methods import awq
from qconv.models.folding import folded_weight, norm_scale, spread_heads

BlockOf = Callable[[Mapping[str, Tensor]], MixerBlock]
"""The attention with some projections' weights exchanged, by module name."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What losses are measured on: inputs, and what the unquantized attention makes of them.

    Attributes:
        inputs: float32 [sequences, length, hidden], normalized.
        target: The output, of the same shape.
        read: What each group of linears reads, float32 [sequences, length, in_features].
    """

    inputs: Tensor
    target: Tensor
    read: Sequence[Tensor]


class AttentionBuild:
    """One build's attention in one layer.

    Attributes:
        build: The build.
        weights: The quantized projections by name, once they are made.
    """

    def __init__(self, context: LayerContext, build: LayerBuild, tensors: Mapping[str, Tensor]) -> None:
        """Of source tensors by full name, float32."""
        self.context = context
        self.build = build
        self.groups = context.layer.groups()
        self.source_weights = {linear.name: tensors[linear.weight] for linear in context.layer.attention.linears()}
        self.weights: dict[str, Packed] = {}
        for group in self.groups:
            build.share({linear.name: self.source_weights[linear.name] for linear in group.linears})

    def compensates(self, linears: Sequence[Linear]) -> bool:
        """Whether second moments decide about the codes of any of them."""
        return any(self.build.rounding(linear) is not None for linear in linears)

    def width(self, linears: Sequence[Linear]) -> int:
        """See :func:`statistics_width`; 0 where none of them is quantized."""
        wanted = any(linear.name in self.build.quantized for linear in linears)
        return statistics_width(self.build, linears) if wanted else 0

    def see(self, inputs: Sequence[InputStatistics], probe: Probe) -> None:
        """Take the statistics of what each group reads, and what losses are measured on."""
        self.inputs, self.probe = list(inputs), probe
        for group, statistics in zip(self.groups, inputs, strict=True):
            self.build.keep_squares(statistics, group.linears)
            self.build.keep_peak(statistics.peak, group.linears)

    def forget_moments(self) -> None:
        """Keep of the inputs' statistics no second moments."""
        self.inputs = [statistics.without_moments() for statistics in self.inputs]

    def search_scales(self, block: BlockOf) -> None:
        """Choose what is folded into the norms and linears whose outputs are read."""
        for number, group in enumerate(self.groups):
            producer = group.producer
            if isinstance(producer, Norm) and self.build.searches_scales(group.linears):
                self._search_norm_scale(block, number, producer)
            elif isinstance(producer, Linear) and self.build.searches_scales((producer, *group.linears)):
                self._search_linear_scale(number, producer)

    def _search_norm_scale(self, block: BlockOf, number: int, norm: Norm) -> None:
        context, build, group = self.context, self.build, self.groups[number]
        weight = context.source.read(norm.weight)
        candidates = awq.candidate_scales(self.inputs[number].magnitude, build.recipe.awq.alpha_points)
        if group.unquantized:
            # What stays in 16 bits takes powers of two without a rounding.
            candidates = [awq.nearest_power_of_two(scale) for scale in candidates]
        scales = [norm_scale(weight, scale.cpu(), norm.offset) for scale in candidates]

        def loss(scale: Tensor) -> float:
            return self._group_loss(block, group, scale.to(context.home))

        choice = awq.choose(list(context.workers.map(at_home(context, loss), scales)))
        build.report.search(norm.name, choice)
        if choice.index:
            build.scales[norm.name] = scales[choice.index]

    def _group_loss(self, block: BlockOf, group: InputGroup, scale: Tensor) -> float:
        rounded = {
            linear.name: self.build.schemes[linear.name].nearest(self.source_weights[linear.name] * scale).div_(scale)
            for linear in group.linears
        }
        return _squared_distance(block(rounded)(self.probe.inputs), self.probe.target)

    def _search_linear_scale(self, number: int, producer: Linear) -> None:
        """v's output channels feed o alone: dividing v's rows is free, since its groups run along its input."""
        build = self.build
        (linear,) = self.groups[number].linears
        repeats, head_dim = build.folds.repeats, build.folds.head_dim
        by_channel = self.inputs[number].magnitude.view(-1, repeats, head_dim).mean(1).reshape(-1)
        scales = awq.candidate_scales(by_channel, build.recipe.awq.alpha_points)
        weight, inputs = self.source_weights[linear.name], self.probe.read[number].flatten(0, 1)
        target = inputs @ weight.t()

        def loss(scale: Tensor) -> float:
            spread = spread_heads(scale, repeats, head_dim)
            return _squared_distance(build.schemes[linear.name].linear(inputs / spread, weight, spread), target)

        choice = awq.choose(list(self.context.workers.map(at_home(self.context, loss), scales)))
        build.report.search(producer.name, choice)
        if choice.index:
            build.scales[producer.name] = scales[choice.index].cpu()

    def folded(self, linears: Sequence[Linear]) -> dict[str, Tensor]:
        """The folded weights of those whose codes second moments decide about, by name."""
        return {linear.name: self._folded(linear) for linear in linears if self.build.rounding(linear) is not None}

    def _folded(self, linear: Linear) -> Tensor:
        return folded_weight(self.source_weights[linear.name], self.input_scale(linear), self.output_scale(linear))

    def input_scale(self, linear: Linear) -> Tensor | None:
        """What is folded into a linear's columns, where attention is; see :class:`Folds`."""
        return placed(self.build.folds.input_scale(linear), self.context.home)

    def output_scale(self, linear: Linear) -> Tensor | None:
        """The same of its rows."""
        return placed(self.build.folds.output_scale(linear), self.context.home)

    def keep(self, results: Mapping[str, Compensated]) -> None:
        """Take projections that second moments have decided about."""
        self.weights |= {name: result.weight for name, result in results.items()}
        self.build.report.compensations.update({name: result.record for name, result in results.items()})

    def round(self, block: BlockOf) -> None:
        """Round the other projections to nearest, with what the method adds to that."""
        self.weights = self._clipped(block) if self.build.static is None else self._with_static_inputs()

    def _with_static_inputs(self) -> dict[str, Packed]:
        """The projections as floats, by name, each with the scale of its input."""
        static = self.build.static
        assert static is not None
        found: dict[str, Packed] = {}
        for statistics, group in zip(self.inputs, self.groups, strict=True):
            weights = {one.name: self.source_weights[one.name] for one in group.linears}
            weights = {name: weight for name, weight in weights.items() if name in self.build.quantized}
            found |= static.together(weights, statistics.peak)
        return found

    def _clipped(self, block: BlockOf) -> dict[str, Packed]:
        """The projections rounded to nearest by name, some with clipping if that helps the block's output.

        Those are the last and what it reads the outputs of: o and v. Errors of q and k meet in a product, which the
        clipping loss does not see.
        """
        context, attention = self.context, self.context.layer.attention
        quantized = [linear for linear in attention.linears() if linear.name in self.build.quantized]
        linears = [linear for linear in quantized if self.build.rounding(linear) is None]
        rounded = list(context.workers.map(at_home(context, self._round), linears))
        plain = {linear.name: pair[0] for linear, pair in zip(linears, rounded, strict=True)}
        clipped = {linear.name: pair[1] for linear, pair in zip(linears, rounded, strict=True) if pair[1] is not None}
        if not clipped:
            return plain
        without, with_clip = self._output_loss(block, plain), self._output_loss(block, {**plain, **clipped})
        self.build.report.searches[f"{self.groups[-1].linears[-1].name}.clip"] = {
            "loss": min(without, with_clip),
            "rtn_loss": without,
            "kept_rtn": not with_clip < without,
        }
        return {**plain, **clipped} if with_clip < without else plain

    def _round(self, linear: Linear) -> tuple[Packed, Packed | None]:
        """A projection quantized without clipping, and with it where clipping is searched."""
        in_scale = self.input_scale(linear)
        weight = self._folded(linear)
        scheme = self.build.schemes[linear.name]
        plain = scheme.round(weight)
        if linear not in (*self.groups[-1].linears, self.groups[-1].producer):
            return plain, None
        number = next(number for number, group in enumerate(self.groups) if linear in group.linears)
        seen = self.inputs[number] if in_scale is None else self.inputs[number].rescaled(in_scale)
        return plain, scheme.clipped(weight, seen.diagonal(scheme.gram_width(linear.in_features)))

    def _output_loss(self, block: BlockOf, weights: Mapping[str, Packed]) -> float:
        return _squared_distance(block(self._effective(weights))(self.probe.inputs), self.probe.target)

    def effective(self) -> dict[str, Tensor]:
        """The quantized projections by name with the folded scales taken out again, so that inputs stay the same."""
        return self._effective(self.weights)

    def _effective(self, weights: Mapping[str, Packed]) -> dict[str, Tensor]:
        effective = {}
        for linear in self.context.layer.attention.linears():
            if linear.name in weights:
                weight = dense(weights[linear.name], self.context.home)
                in_scale, out_scale = self.input_scale(linear), self.output_scale(linear)
                if in_scale is not None:
                    weight.div_(in_scale)
                if out_scale is not None:
                    weight.mul_(out_scale.unsqueeze(-1))
                effective[linear.name] = weight
        return effective


def _squared_distance(output: Tensor, target: Tensor) -> float:
    return float(torch.linalg.vector_norm(output - target)) ** 2
