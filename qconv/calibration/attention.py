"""The attention half of a layer: statistics of q, k, v and o, scale searches, quantization, and the pass onward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from qconv.calibration.attention_build import AttentionBuild, Probe
from qconv.calibration.forward import AttentionBlock
from qconv.calibration.layer import Finished, LayerBuild, LayerContext, Workspace
from qconv.calibration.rounding import Factors, compensate, empty_statistics
from qconv.calibration.schemes import Compensated
from qconv.calibration.statistics import InputSquares, InputStatistics
from qconv.core.architecture import Linear

WINDOW_TOKENS = 2048
PROBE_SEQUENCES = 4
Made = TypeVar("Made")


def calibrate_attention(context: LayerContext) -> Iterator[tuple[LayerBuild, Finished]]:
    """Quantize the attention of a layer for each build and write the layer's middle activations.

    Yields each build's modules in the order of the plan: input norm, q, k, v, o, what attention keeps.
    """
    half = _AttentionHalf(context)
    half.collect()
    half.quantize()
    attention = context.layer.attention
    for part in half.parts:
        build = part.build
        yield build, build.dense(context.layer.input_norm)
        for linear in attention.linears():
            yield build, build.finished(linear, part.weights.get(linear.name))
        for kept in attention.kept():
            yield build, build.dense(kept)
    half.pass_on()


class _AttentionHalf:
    def __init__(self, context: LayerContext) -> None:
        self.context = context
        self.reference = context.work.reference
        layer, source = context.layer, context.source
        modules = (*layer.attention.modules(), layer.input_norm)
        tensors = {name: source.read(name).float() for module in modules for name, _ in module.tensors()}
        self.tensors = tensors
        self.norm_weight = source.read(layer.input_norm.weight)
        self.norm = context.decoder.norm(layer, layer.input_norm, self.norm_weight)
        self.block: AttentionBlock = context.decoder.attention(layer, tensors)
        self.parts = [AttentionBuild(context, build, tensors, self.norm_weight) for build in context.builds]
        self.qkv = layer.attention.linears()[:3]
        self.o = (layer.attention.o,)
        self.qkv_inputs = self._statistics(self.qkv, map(self._width_of_qkv, self.parts))
        self.o_inputs = self._statistics(self.o, map(self._first_width_of_o, self.parts))

    def _statistics(self, linears: Sequence[Linear], widths: Iterable[int]) -> dict[int, InputStatistics]:
        """Of an input, by width."""
        return empty_statistics(linears[0].in_features, widths, drift=self.reference is not None)

    def _width_of_qkv(self, part: AttentionBuild) -> int:
        return part.width(self.qkv)

    def _first_width_of_o(self, part: AttentionBuild) -> int:
        """Before q, k and v are quantized: squares alone, where its moments are those of what they then pass on."""
        width = part.width(self.o)
        return min(width, 1) if self.reference is not None and part.compensates(self.o) else width

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
        """Statistics of both inputs over all tokens; the probes on which losses are measured."""

        def inputs(window: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor | None, list[InputSquares]]:
            _, normed = self._normed(*window)
            _, o_input = self.block.with_o_input(normed)
            normed, o_input = normed.flatten(0, 1), o_input.flatten(0, 1)
            unquantized = None if self.reference is None else self._normed(*window, self.reference)[1].flatten(0, 1)
            squares = [] if self.context.seen is None else [InputSquares.of(normed), InputSquares.of(o_input)]
            return normed, o_input, unquantized, squares

        for normed, o_input, unquantized, squares in self._windows(inputs):
            for statistics in self.qkv_inputs.values():
                statistics.update(normed, reference=unquantized)
            for statistics in self.o_inputs.values():
                statistics.update(o_input)
            for linears, seen in zip((self.qkv, self.o), squares, strict=False):
                self.context.see(linears, seen)
        for statistics in self.qkv_inputs.values():
            statistics.shrink_drift()
        probes = {tokens: self._probe(tokens) for tokens in {one.build.recipe.awq.search_tokens for one in self.parts}}
        for part in self.parts:
            probe = probes[part.build.recipe.awq.search_tokens]
            part.see(self.qkv_inputs[self._width_of_qkv(part)], self.o_inputs[self._first_width_of_o(part)], probe)

    def _collect_o(self, part: AttentionBuild, reference: Workspace) -> InputStatistics:
        """Statistics of o's input anew: what the quantized q, k and v make of it, beside the unquantized model's."""
        block = self._block(part.effective())

        def inputs(window: tuple[int, int]) -> tuple[Tensor, Tensor]:
            _, o_input = block.with_o_input(self._normed(*window)[1])
            _, unquantized = self.block.with_o_input(self._normed(*window, reference)[1])
            return o_input.flatten(0, 1), unquantized.flatten(0, 1)

        width = part.width(self.o)
        found = self._statistics(self.o, [width])[width]
        for o_input, unquantized in self._windows(inputs):
            found.update(o_input, reference=unquantized)
        found.shrink_drift()
        return found

    def _windows(self, work: Callable[[tuple[int, int]], Made]) -> Iterator[Made]:
        """What comes of each window of whole sequences, in their order."""
        return self.context.workers.map(work, self.context.work.sequence_windows(WINDOW_TOKENS))

    def _probe(self, search_tokens: int) -> Probe:
        """The first positions of a few sequences spread over the corpus; causal attention makes a prefix exact."""
        work, wanted = self.context.work, 4 * search_tokens
        sequences = work.tokens // work.sequence_length
        count = min(PROBE_SEQUENCES, sequences)
        length = min(work.sequence_length, -(-wanted // count))
        picks = [sequences * index // count for index in range(count)]
        rows = [work.inputs.read(pick * work.sequence_length, pick * work.sequence_length + length) for pick in picks]
        normed: Tensor = self.norm(torch.stack(rows))
        return Probe(normed, *self.block.with_o_input(normed))

    def quantize(self) -> None:
        """Give each build its quantized projections."""
        for part in self.parts:
            part.search_scales(self._block)
            part.round(self._block)
        self._compensate([part for part in self.parts if part.compensates((*self.qkv, *self.o))])

    def _compensate(self, parts: Sequence[AttentionBuild]) -> None:
        """Quantize by GPTQ; q, k and v share one Hessian, and builds what they make of it."""

        def solve(
            subject: tuple[Sequence[Linear], Mapping[int, InputStatistics]],
        ) -> list[dict[str, Compensated]]:
            linears, statistics = subject
            factors: Factors = {}
            found = []
            for part in parts:
                weights = part.folded(linears)
                scale = part.build.folds.input_scale(linears[0])
                found.append(compensate(part.build, statistics[part.width(linears)], weights, scale, factors))
            return found

        if self.reference is None:
            # The larger one first, so that it need not be waited for.
            subjects = ((self.o, self.o_inputs), (self.qkv, self.qkv_inputs))
            of_o, of_qkv = self.context.workers.map(solve, subjects)
            for part, first, last in zip(parts, of_qkv, of_o, strict=True):
                part.keep(first)
                part.keep(last)
            return
        for part, one in zip(parts, solve((self.qkv, self.qkv_inputs)), strict=True):
            part.keep(one)
            if not part.compensates(self.o):
                continue
            # What was seen of the unquantized q, k and v has served: o's moments are as large again.
            self.qkv_inputs, self.o_inputs = {}, {}
            part.forget_moments()
            o_inputs = {part.width(self.o): self._collect_o(part, self.reference)}
            part.keep(solve((self.o, o_inputs))[0])

    def pass_on(self) -> None:
        """Write the residual stream after attention, through the quantized weights where the recipe propagates."""
        block = self.block
        if self.context.calibration.propagate:
            block = self._block(self.parts[0].effective())
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
