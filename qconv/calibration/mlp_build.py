"""One build's part in an MLP: what is folded, and how gate, up and down are rounded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qconv.calibration.layer import LayerBuild
from qconv.calibration.mlp import FoldedScales, GatedWeights, StagedWeights, dequantized
from qconv.calibration.mlp_inputs import MlpInputs, Sample
from qconv.calibration.placement import staged_weights
from qconv.calibration.rounding import Factors, compensate, statistics_width
from qconv.calibration.routing import Assignment
from qconv.calibration.schemes import Compensated, placed
from qconv.calibration.statistics import InputStatistics
from qconv.core.architecture import Linear, Mlp
from qconv.core.grid import Packed
from qconv.methods import awq
from qconv.models.folding import norm_scale

SHARED_SEARCH_TOKENS = 4096
"""Tokens on which the shared scale's loss is measured, spread over the layer's experts."""


def search_shared_scale(inputs: MlpInputs, build: LayerBuild) -> None:
    """Choose what is folded into the post-attention norm, by the loss of all MLPs' outputs together."""
    context, mlps = inputs.context, inputs.context.layer.mlps()
    if not build.searches_scales([linear for mlp in mlps for linear in (mlp.gate, mlp.up)]):
        return
    magnitude = inputs.layer[inputs.width(build)].magnitude
    candidates = awq.candidate_scales(magnitude, build.recipe.awq.alpha_points)
    if context.layer.routers():
        # The router stays in 16 bits; powers of two fold into it without a rounding that would shift the routing.
        candidates = [awq.nearest_power_of_two(scale) for scale in candidates]
    offset = context.layer.post_attention_norm.offset
    scales = [norm_scale(inputs.norm_weight, scale.cpu(), offset) for scale in candidates]
    size = min(build.recipe.awq.search_tokens, max(16, SHARED_SEARCH_TOKENS // len(mlps)))

    def losses(index: int) -> list[float]:
        staged = staged_weights(context, mlps[index])
        return context.workers.lending.call(lambda device: on(device, index, staged), mlps[index].gate.name)

    def on(device: torch.device, index: int, staged: StagedWeights) -> list[float]:
        weights = staged.on(device)
        sample = inputs.sample(index, inputs.assignment(index), size, device)
        target = weights(sample.inputs)
        schemes = build.schemes[mlps[index].gate.name], build.schemes[mlps[index].up.name]
        found = []
        for scale in scales:
            inner = weights.rounded_inner(sample.inputs, schemes, scale.to(device))
            found.append(sample.loss(weights.project(inner), target))
        return found

    table = list(context.workers.map(losses, range(len(mlps))))
    choice = awq.choose([math.fsum(column) for column in zip(*table, strict=True)])
    build.report.search(context.layer.post_attention_norm.name, choice)
    if choice.index:
        build.scales[context.layer.post_attention_norm.name] = scales[choice.index]


@dataclass(frozen=True, slots=True)
class Subject:
    """An MLP at work: source weights, the tokens of its statistics, the sample of its losses, the output on that."""

    mlp: Mlp
    weights: GatedWeights
    assignment: Assignment
    sample: Sample
    target: Tensor


class MlpBuild:
    """One build's MLP.

    Attributes:
        build: The build.
        record: What happened, for the report.
        weights: The quantized weights by module name, once they are made.
        compensations: What the report says of linears that GPTQ rounded, by name.
    """

    def __init__(self, inputs: MlpInputs, build: LayerBuild, subject: Subject, record: Mapping[str, Any]) -> None:
        """Nothing is folded yet; ``record`` is what the report says whatever the build."""
        self.inputs = inputs
        self.build = build
        self.subject = subject
        self.record = dict(record)
        self.scales = FoldedScales(placed(build.folds.input_scale(subject.mlp.up), subject.weights.device), None)
        self.folded = self.scales.fold(subject.weights)
        build.share({subject.mlp.gate.name: self.folded.gate, subject.mlp.up.name: self.folded.up})
        self.weights: dict[str, Packed] = {}
        self.compensations: dict[str, dict[str, Any]] = {}

    @property
    def inner_width(self) -> int | None:
        """The width of the second moments that it asks for of down's unquantized input; None if it does not look.

        Clipping down needs some; GPTQ collects its own.
        """
        mlp = self.subject.mlp
        if self.build.static is not None:
            return 0
        if not self._rounded(*mlp.linears()) and not self._searches_inner():
            return None
        return 0 if self._compensated(mlp.down) else statistics_width(self.build, (mlp.down,))

    @property
    def input_width(self) -> int | None:
        """The same of the input of gate and up."""
        mlp = self.subject.mlp
        if self.build.static is not None or self.build.quantized.isdisjoint((mlp.gate.name, mlp.up.name)):
            return None
        return self.inputs.width(self.build)

    def _searches_inner(self) -> bool:
        """Whether a scale is searched that folds from down into up."""
        mlp = self.subject.mlp
        return mlp.folds and self.build.searches_scales((mlp.up, mlp.down))

    def _compensated(self, *linears: Linear) -> list[Linear]:
        """Those whose codes second moments decide about."""
        return [linear for linear in linears if self.build.rounding(linear) is not None]

    def _rounded(self, *linears: Linear) -> list[Linear]:
        """The others that are quantized."""
        quantized = (linear for linear in linears if linear.name in self.build.quantized)
        return [linear for linear in quantized if self.build.rounding(linear) is None]

    def _folded(self, linears: Sequence[Linear]) -> dict[str, Tensor]:
        """Folded weights by name."""
        mlp, folded = self.subject.mlp, self.folded
        weights = {mlp.gate: folded.gate, mlp.up: folded.up, mlp.down: folded.down}
        return {linear.name: weights[linear] for linear in linears}

    def search(self, inner: InputStatistics) -> None:
        """Choose what is folded into up, whose output feeds down alone: its groups run along its input, so it is free.

        Args:
            inner: Statistics of down's input.
        """
        mlp, build, weights, sample = self.subject.mlp, self.build, self.subject.weights, self.subject.sample
        if not self._searches_inner():
            return
        scales = awq.candidate_scales(inner.magnitude, build.recipe.awq.alpha_points)
        activations = weights.inner(sample.inputs)
        target = activations @ weights.down.t()
        scheme, losses = build.schemes[mlp.down.name], []
        for scale in scales:
            losses.append(sample.loss(scheme.linear(activations / scale, weights.down, scale), target))
        choice = awq.choose(losses)
        self.record |= {"alpha": round(choice.alpha, 4), "kept_rtn": choice.index == 0}
        self.scales = replace(self.scales, inner=scales[choice.index] if choice.index else None)
        self.folded = self.scales.fold(weights)

    def compensate_inputs(self, inputs: InputStatistics, factors: Factors) -> None:
        """Quantize gate and up by second moments, which they share; those of them that ask for it."""
        weights = self._folded(self._compensated(self.subject.mlp.gate, self.subject.mlp.up))
        self._keep(compensate(self.build, inputs, weights, self.scales.shared, factors))

    def compensate_down(self) -> None:
        """Quantize down by second moments, if it asks for it, on what the quantized gate and up pass to it."""
        subject, mlp = self.subject, self.subject.mlp
        if not self._compensated(mlp.down):
            return
        width = mlp.down.in_features
        weights, asked = (subject.weights, self.passing()), [(self.build, width)]
        inner = self.inputs.inner_statistics(mlp, weights, subject.assignment, asked)[width]
        self._keep(compensate(self.build, inner, self._folded([mlp.down])))

    def _keep(self, results: Mapping[str, Compensated]) -> None:
        self.weights |= {name: result.weight for name, result in results.items()}
        self.compensations |= {name: result.record for name, result in results.items()}

    def round(self, inputs: InputStatistics | None, inner: InputStatistics) -> None:
        """Round the other folded weights to nearest, with what the method adds to that.

        Args:
            inputs: Statistics of the input of gate and up; None where nobody has asked for them.
            inner: Of down's.
        """
        if self.build.static is not None:
            self._with_static_inputs(inner.peak)
        elif self._rounded(*self.subject.mlp.linears()):
            self._clip(inputs, inner)

    def _with_static_inputs(self, inner_peak: float) -> None:
        """The weights as floats; one scale for the inputs of all gates and ups of the layer, as engines want it."""
        mlp, static = self.subject.mlp, self.build.static
        assert static is not None
        peak = self.inputs.layer[self.inputs.width(self.build)].peak
        self.weights |= static.together(self._folded(self._rounded(mlp.gate, mlp.up)), peak)
        self.weights |= static.together(self._folded(self._rounded(mlp.down)), inner_peak)

    def _clip(self, inputs: InputStatistics | None, inner: InputStatistics) -> None:
        """Round with clipping where that helps the MLP's output."""
        mlp, scales = self.subject.mlp, self.scales
        plain: dict[str, Packed] = {}
        clipped: dict[str, Packed] = {}
        if scales.shared is not None and inputs is not None:
            inputs = inputs.rescaled(scales.shared)
        if scales.inner is not None:
            inner = inner.rescaled(scales.inner)
        seen_by = {mlp.gate.name: inputs, mlp.up.name: inputs, mlp.down.name: inner}
        for name, weight in self._folded(self._rounded(*mlp.linears())).items():
            scheme, seen = self.build.schemes[name], seen_by[name]
            plain[name] = scheme.round(weight)
            width = scheme.gram_width(weight.shape[1])
            found = None if seen is None else scheme.clipped(weight, seen.diagonal(width))
            if found is not None:
                clipped[name] = found
        clipped = {**plain, **clipped} if clipped else {}
        losses = [self._loss(weights) for weights in (plain, clipped) if weights]
        self.record["clipped"] = len(losses) == 2 and losses[1] < losses[0]
        self.weights |= clipped if self.record["clipped"] else plain

    def measure(self) -> None:
        """Record the loss of the quantized MLP, and what plain rounding would cost: the yardstick of every method."""
        loss = self._loss(self.weights)
        self.record |= {"loss": loss, "rtn_loss": loss if self.build.static is not None else self._rtn_loss()}

    def _loss(self, quantized: Mapping[str, Packed]) -> float:
        """The weighted squared error of the MLP's output on its sample."""
        sample, shared = self.subject.sample, self.scales.shared
        inputs = sample.inputs if shared is None else sample.inputs / shared
        return sample.loss(dequantized(self.subject.mlp, self.folded, quantized)(inputs), self.subject.target)

    def _rtn_loss(self) -> float:
        mlp, weights, sample = self.subject.mlp, self.subject.weights, self.subject.sample
        gate, up, down = (
            self.build.schemes[linear.name].nearest(weight) if linear.name in self.build.quantized else weight
            for linear, weight in zip(mlp.linears(), (weights.gate, weights.up, weights.down), strict=True)
        )
        return sample.loss(weights.replaced(gate=gate, up=up, down=down)(sample.inputs), self.subject.target)

    def passing(self) -> GatedWeights:
        """What computes the outputs from the unfolded norm's output, with those weights that are quantized so far."""
        return self.scales.unfold_input(dequantized(self.subject.mlp, self.folded, self.weights))
