"""The attention half of a layer: statistics of what its linears read, scale searches, quantization, the pass onward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from qconv.calibration.attention_build import AttentionBuild, Probe
from qconv.calibration.forward import MixerBlock
from qconv.calibration.layer import Finished, LayerBuild, LayerContext, Workspace
from qconv.calibration.placement import at_home
from qconv.calibration.rounding import Factors, compensate, empty_statistics
from qconv.calibration.schemes import Compensated
from qconv.calibration.statistics import InputSquares, InputStatistics
from qconv.core.architecture import InputGroup, Layer, Linear

WINDOW_TOKENS = 2048
WIDE_FEATURES = 12288
"""Outputs of a mixer's widest linear up to which a window is whole: those of 96 heads of 128."""
PROBE_SEQUENCES = 4
Made = TypeVar("Made")


def calibrate_attention(context: LayerContext) -> Iterator[tuple[LayerBuild, Finished]]:
    """Quantize the attention of a layer for each build and write the layer's middle activations.

    Yields each build's modules in the order of the plan: input norm, the linears, what attention keeps, the scales of a
    cache.
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
        if build.recipe.kv_cache is not None:
            yield build, build.cache_scales(context.layer, *half.cached(part))
    half.pass_on()


def window_tokens(layer: Layer) -> int:
    """How many tokens pass a layer's mixer at once: fewer where its heads are wide together, as latent attention's."""
    widest = max(one.out_features for one in layer.attention.modules() if isinstance(one, Linear))
    return WINDOW_TOKENS * WIDE_FEATURES // max(widest, WIDE_FEATURES)


class _AttentionHalf:
    def __init__(self, context: LayerContext) -> None:
        self.context = context
        self.reference = context.work.reference
        layer, source = context.layer, context.source
        modules = (*layer.attention.modules(), layer.input_norm)
        names = [name for module in modules for name, _ in module.tensors()]
        tensors = {name: source.read(name).to(context.home).float() for name in names}
        self.tensors = tensors
        self.norm_weight = source.read(layer.input_norm.weight)
        self.norm = context.decoder.norm(layer, layer.input_norm, self.norm_weight.to(context.home))
        self.block: MixerBlock = context.decoder.attention(layer, tensors)
        self.parts = [AttentionBuild(context, build, tensors) for build in context.builds]
        self.groups = layer.groups()
        self.inputs = [
            self._statistics(group, [self._first_width(part, number) for part in self.parts])
            for number, group in enumerate(self.groups)
        ]

    def _statistics(self, group: InputGroup, widths: Iterable[int]) -> dict[int, InputStatistics]:
        """Of an input, by width."""
        return empty_statistics(group.in_features, widths, self.context.home, drift=self.reference is not None)

    def _first_width(self, part: AttentionBuild, number: int) -> int:
        """Before anything is quantized: squares alone, where moments are those of what quantized linears pass on."""
        linears = self.groups[number].linears
        width = part.width(linears)
        later = number > 0 and self.reference is not None and part.compensates(linears)
        return min(width, 1) if later else width

    def _normed(self, start: int, stop: int, work: Workspace | None = None) -> tuple[Tensor, Tensor]:
        """The residual stream [tokens, hidden] and its norm [sequences, length, hidden]; of the quantized model."""
        hidden = (work or self.context.work).inputs.read(start, stop, self.context.home)
        normed: Tensor = self.norm(hidden)
        return hidden, normed.view(-1, self.context.work.sequence_length, hidden.shape[-1])

    def _block(self, replaced: Mapping[str, Tensor]) -> MixerBlock:
        """The attention with some projections' weights exchanged, by module name."""
        exchanged = {f"{name}.weight": weight for name, weight in replaced.items()}
        return self.context.decoder.attention(self.context.layer, {**self.tensors, **exchanged})

    def collect(self) -> None:
        """Statistics of all inputs over all tokens; the probes on which losses are measured."""

        def inputs(window: tuple[int, int]) -> tuple[list[Tensor], Tensor | None, list[InputSquares]]:
            _, normed = self._normed(*window)
            read = [one.flatten(0, 1) for one in self.block.with_inputs(normed)[1]]
            unquantized = None if self.reference is None else self._normed(*window, self.reference)[1].flatten(0, 1)
            squares = [] if self.context.seen is None else [InputSquares.of(one) for one in read]
            return read, unquantized, squares

        for read, unquantized, squares in self._windows(inputs):
            for number, (found, one) in enumerate(zip(self.inputs, read, strict=True)):
                for statistics in found.values():
                    statistics.update(one, reference=unquantized if number == 0 else None)
            for group, seen in zip(self.groups, squares, strict=False):
                self.context.see(group.linears, seen)
        for statistics in self.inputs[0].values():
            statistics.shrink_drift()
        probes = {tokens: self._probe(tokens) for tokens in {one.build.recipe.awq.search_tokens for one in self.parts}}
        for part in self.parts:
            inputs_of = [found[self._first_width(part, number)] for number, found in enumerate(self.inputs)]
            part.see(inputs_of, probes[part.build.recipe.awq.search_tokens])

    def _collect_again(self, part: AttentionBuild, number: int, reference: Workspace) -> InputStatistics:
        """Statistics of an input anew: what quantized linears make of it, beside the unquantized model's."""
        block = self._block(part.effective())

        def inputs(window: tuple[int, int]) -> tuple[Tensor, Tensor]:
            _, quantized = block.with_inputs(self._normed(*window)[1])
            _, unquantized = self.block.with_inputs(self._normed(*window, reference)[1])
            return quantized[number].flatten(0, 1), unquantized[number].flatten(0, 1)

        group = self.groups[number]
        width = part.width(group.linears)
        found = self._statistics(group, [width])[width]
        for quantized, unquantized in self._windows(inputs):
            found.update(quantized, reference=unquantized)
        found.shrink_drift()
        return found

    def _windows(self, work: Callable[[tuple[int, int]], Made]) -> Iterator[Made]:
        """What comes of each window of whole sequences, in their order."""
        windows = self.context.work.sequence_windows(window_tokens(self.context.layer))
        return self.context.workers.map(at_home(self.context, work), windows)

    def _probe(self, search_tokens: int) -> Probe:
        """The first positions of a few sequences spread over the corpus; causal attention makes a prefix exact."""
        work, wanted = self.context.work, 4 * search_tokens
        sequences = work.tokens // work.sequence_length
        count = min(PROBE_SEQUENCES, sequences)
        length = min(work.sequence_length, -(-wanted // count))
        picks = [sequences * index // count for index in range(count)]
        starts = [pick * work.sequence_length for pick in picks]
        rows = [work.inputs.read(start, start + length, self.context.home) for start in starts]
        normed: Tensor = self.norm(torch.stack(rows))
        return Probe(normed, *self.block.with_inputs(normed))

    def quantize(self) -> None:
        """Give each build its quantized projections."""
        for part in self.parts:
            part.search_scales(self._block)
            part.round(self._block)
        self._compensate([part for part in self.parts if part.compensates(self.context.layer.attention.linears())])

    def _compensate(self, parts: Sequence[AttentionBuild]) -> None:
        """Quantize by GPTQ; linears that read one tensor share a Hessian, and builds what they make of it."""

        def solve(subject: tuple[InputGroup, Mapping[int, InputStatistics]]) -> list[dict[str, Compensated]]:
            group, statistics = subject
            factors: Factors = {}
            found = []
            for part in parts:
                weights = part.folded(group.linears)
                scale = part.input_scale(group.linears[0])
                found.append(compensate(part.build, statistics[part.width(group.linears)], weights, scale, factors))
            return found

        subjects = list(zip(self.groups, self.inputs, strict=True))
        if self.reference is None:
            # The last first: it is the largest, so that it need not be waited for.
            solved = list(self.context.workers.map(at_home(self.context, solve), subjects[::-1]))[::-1]
            for number, part in enumerate(parts):
                for results in solved:
                    part.keep(results[number])
            return
        for part, first in zip(parts, solve(subjects[0]), strict=True):
            part.keep(first)
            # What was seen of the unquantized linears has served: later inputs' moments are as large again.
            self.inputs, subjects = [], []
            part.forget_moments()
            for number, group in enumerate(self.groups):
                if number > 0 and part.compensates(group.linears):
                    inputs = {part.width(group.linears): self._collect_again(part, number, self.reference)}
                    part.keep(solve((group, inputs))[0])

    def cached(self, part: AttentionBuild) -> tuple[float, float]:
        """The largest magnitude of the keys and of the values that a build's attention gives to a cache."""
        block = self._block(part.effective())

        def largest(window: tuple[int, int]) -> tuple[Tensor, Tensor]:
            return block.cached(self._normed(*window)[1])

        keys, values = (torch.stack(found).amax(0) for found in zip(*self._windows(largest), strict=True))
        # Values are cached with what is folded into them, which a block of effective weights takes out again.
        folded = part.output_scale(self.context.layer.heads.v)
        return float(keys.max()), float((values if folded is None else values / folded).max())

    def pass_on(self) -> None:
        """Write the residual stream after attention, through the quantized weights where the recipe propagates."""
        block = self.block
        if self.context.calibration.propagate:
            block = self._block(self.parts[0].effective())
        for work, attention in ((self.context.work, block), (self.reference, self.block)):
            if work is not None:
                self._attend(work, attention)

    def _attend(self, work: Workspace, block: MixerBlock) -> None:
        def attend(window: tuple[int, int]) -> None:
            hidden, normed = self._normed(*window, work)
            hidden.add_(block(normed).view_as(hidden))
            work.middle.write(window[0], hidden)
            work.total.write(window[0], hidden)

        for _ in self._windows(attend):
            pass
