"""The MLP half of a layer: every expert streamed through with the tokens that the router sends it.

Two passes over the experts' weights. The first measures for each candidate scale of the post-attention norm the loss
summed over all experts, since they and the router share that one scale. The second calibrates, quantizes and applies
the experts one by one, each for all builds. Each worker thread holds one expert, and nothing is held for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qconv.calibration.activations import SetAside
from qconv.calibration.layer import Finished, LayerBuild, LayerContext, Workspace
from qconv.calibration.mixture import seen_by_corpus
from qconv.calibration.mlp import GatedWeights
from qconv.calibration.mlp_build import MlpBuild, Subject, search_shared_scale
from qconv.calibration.mlp_inputs import WINDOW_TOKENS, MlpInputs
from qconv.calibration.placement import staged_weights
from qconv.calibration.rounding import Factors
from qconv.calibration.routing import Assignment
from qconv.calibration.schemes import placed
from qconv.calibration.statistics import InputSquares, InputStatistics
from qconv.core.architecture import Mlp
from qconv.core.devices import CPU
from qconv.core.grid import Packed


def calibrate_mlps(context: LayerContext) -> Iterator[tuple[LayerBuild, Finished]]:
    """Quantize the MLPs of a layer for each build and add their outputs to the layer's running output.

    Yields each build's modules in the order of the plan: post-attention norm, routers, then each MLP's gate, up and
    down.
    """
    half = _MlpHalf(context)
    for build in context.builds:
        search_shared_scale(half.inputs, build)
        yield build, build.dense(context.layer.post_attention_norm)
        for kept in context.layer.routing():
            yield build, build.dense(kept)
    yield from half.quantize_all()


@dataclass(frozen=True, slots=True)
class _Result:
    """A calibrated MLP of one build.

    Attributes:
        weights: Its quantized weights by module name.
        inner_scale: What was folded into up, on the host.
        record: For the report.
        compensations: The same by linear, where GPTQ rounded it.
    """

    weights: dict[str, Packed]
    inner_scale: Tensor | None
    record: dict[str, Any]
    compensations: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, made: MlpBuild) -> _Result:
        return cls(made.weights, placed(made.scales.inner, CPU), made.record, made.compensations)


@dataclass(slots=True)
class _Passed:
    """What an MLP passes on: weighted outputs for each model whose activations go along, and its squared inputs."""

    outputs: list[SetAside] = field(default_factory=list)
    squares: list[tuple[InputSquares, InputSquares]] = field(default_factory=list)


class _MlpHalf:
    def __init__(self, context: LayerContext) -> None:
        self.context = context
        self.inputs = MlpInputs(context)

    def quantize_all(self) -> Iterator[tuple[LayerBuild, Finished]]:
        """Calibrate and quantize every MLP, and add its output for the tokens that it sees."""
        context, mlps = self.context, self.context.layer.mlps()
        for mlp, (results, passed) in zip(mlps, context.workers.map(self._make, range(len(mlps))), strict=True):
            for build, result in zip(context.builds, results, strict=True):
                if result.inner_scale is not None:
                    build.scales[mlp.up.name] = result.inner_scale
                build.report.experts.append(result.record)
                build.report.compensations.update(result.compensations)
                for linear in mlp.linears():
                    yield build, build.finished(linear, result.weights.get(linear.name))
            self._pass_on(mlp, passed)

    def _pass_on(self, mlp: Mlp, passed: _Passed) -> None:
        """In the order of the experts, so that sums come out the same however the threads ran."""
        for linear in mlp.linears():
            self.context.see((linear,), InputSquares.empty(linear.in_features))
        for inputs, inner in passed.squares:
            self.context.see((mlp.gate, mlp.up), inputs)
            self.context.see((mlp.down,), inner)
        for work, set_aside in zip((self.context.work, self.inputs.reference), passed.outputs, strict=False):
            for tokens, output in set_aside:
                assert work is not None
                work.total.add(tokens, output)

    def _make(self, index: int) -> tuple[list[_Result], _Passed]:
        """A quantized MLP of each build, and what it passes on for the tokens that the router sends it.

        The outputs are computed when all that quantizing needed is released, so that both peak alike.
        """
        mlp = self.context.layer.mlps()[index]
        staged = staged_weights(self.context, mlp)
        return self.context.workers.lending.call(lambda device: self._made(index, staged.on(device)), mlp.gate.name)

    def _made(self, index: int, source: GatedWeights) -> tuple[list[_Result], _Passed]:
        context = self.context
        made = self._quantized(index, source)
        passing = made[0].passing() if context.calibration.propagate and not context.is_last else source
        results = [_Result.of(one) for one in made]
        del made
        passed, reference = _Passed(), self.inputs.reference
        self._passed(passed, context.work, self.inputs.routing.assignment(index), passing)
        if reference is not None and self.inputs.reference_routing is not None:
            self._passed(passed, reference, self.inputs.reference_routing.assignment(index), source)
        return results, passed

    def _quantized(self, index: int, weights: GatedWeights) -> list[MlpBuild]:
        """An MLP of each build; what they look at is looked at once."""
        context, inputs, mlp = self.context, self.inputs, self.context.layer.mlps()[index]
        assignment, routed = inputs.assignment(index), inputs.routing.assignment(index)
        record = {
            "module": mlp.gate.name.rpartition(".")[0],
            "tokens": len(routed.tokens),
            "calibration_tokens": len(assignment.tokens),
            **seen_by_corpus(context.calibration, routed.tokens),
            "shrinkage": round(inputs.shrinkage / max(len(assignment.tokens) + inputs.shrinkage, 1), 6),
        }
        subjects = {}
        for size in {build.recipe.awq.search_tokens for build in context.builds}:
            sample = inputs.sample(index, assignment, size, weights.device)
            subjects[size] = Subject(mlp, weights, assignment, sample, weights(sample.inputs))
        parts = [MlpBuild(inputs, one, subjects[one.recipe.awq.search_tokens], record) for one in context.builds]
        asked = [(part.build, part.inner_width) for part in parts if part.inner_width is not None]
        inner = inputs.inner_statistics(mlp, (weights, weights), assignment, asked)
        for part in parts:
            if part.inner_width is not None:
                part.search(inner[part.inner_width])
        self._round(mlp, assignment, parts, inner)
        return parts

    def _round(
        self, mlp: Mlp, assignment: Assignment, parts: Sequence[MlpBuild], inner: Mapping[int, InputStatistics]
    ) -> None:
        asked = [(part.build, part.input_width) for part in parts if part.input_width is not None]
        statistics = self.inputs.statistics(mlp, assignment, asked, parts[0].subject.weights.device)
        factors: Factors = {}
        for part in parts:
            seen = None if part.input_width is None else statistics[part.input_width]
            if part.inner_width is not None:
                part.round(seen, inner[part.inner_width])
            if seen is not None:
                part.compensate_inputs(seen, factors)
        # They are the largest by far, and down has its own.
        statistics.clear()
        factors.clear()
        seen = None
        for part in parts:
            part.compensate_down()
            part.measure()

    def _passed(self, passed: _Passed, work: Workspace, routed: Assignment, weights: GatedWeights) -> None:
        """Add the MLP's weighted output for its tokens, where a layer follows, and what is seen of its inputs."""
        is_last, seen = self.context.is_last, self.context.seen is not None

        def windows() -> Iterator[tuple[Tensor, Tensor]]:
            for start in range(0, len(routed.tokens), WINDOW_TOKENS):
                part = routed[start : start + WINDOW_TOKENS]
                normed = part.read(self.inputs.normed(part.tokens, weights.device, work))
                inner = weights.inner(normed)
                if seen:
                    passed.squares.append((InputSquares.of(normed), InputSquares.of(inner)))
                if not is_last:
                    yield part.tokens, part.counted(weights.project(inner))

        if seen or not is_last:
            passed.outputs.append(SetAside(work.total.path.parent, work.total.width, windows()))
