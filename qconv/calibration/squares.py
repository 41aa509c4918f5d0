"""One layer of the unquantized model: the squared inputs of its linears summed, and the tokens passed through.

An expert counts the tokens that the router sends it. Sums are taken over fixed windows of tokens and added in their
order, so that they come out the same however many threads there were.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qconv.artifacts.source import Source
from qconv.calibration.forward import Decoder
from qconv.calibration.layer import Workspace
from qconv.calibration.mlp import GatedWeights
from qconv.calibration.mlp_inputs import WINDOW_TOKENS
from qconv.calibration.placement import at_home, staged_weights
from qconv.calibration.routing import Assignment, Routing
from qconv.calibration.statistics import InputSquares
from qconv.core.architecture import Layer, Linear
from qconv.core.once import MadeOnce
from qconv.core.workers import Workers

WHOLE_TOKENS = 8192
"""An MLP that sees more tokens is worked on by all threads together, a window each, since it holds more outputs."""


@dataclass(frozen=True, slots=True)
class LayerPass:
    """What the pass through one layer needs; ``is_last`` says that nobody needs its outputs."""

    source: Source
    decoder: Decoder
    layer: Layer
    work: Workspace
    workers: Workers
    is_last: bool

    @property
    def home(self) -> torch.device:
        """Where attention and routing are."""
        return self.workers.lending.home


def collect_squares(layer_pass: LayerPass) -> Iterator[tuple[Linear, InputSquares]]:
    """The squared inputs of every linear of a layer, routers included, in the order in which they are known.

    Afterwards the layer's running output is complete, unless it is the last one's.

    Raises:
        CheckpointError: a weight cannot be read or is not finite.
        OutputError: the disk is full.
    """
    with torch.no_grad():
        yield from _attention(layer_pass)
        yield from _mlps(layer_pass)


def _attention(layer_pass: LayerPass) -> Iterator[tuple[Linear, InputSquares]]:
    source, decoder, layer, work = layer_pass.source, layer_pass.decoder, layer_pass.layer, layer_pass.work
    attention = layer.attention
    names = [name for module in attention.modules() for name, _ in module.tensors()]
    home = layer_pass.home
    block = decoder.attention(layer, {name: source.read(name).to(home) for name in names})
    norm = decoder.norm(layer, layer.input_norm, source.read(layer.input_norm.weight).to(home))

    groups = layer.groups()

    def attend(window: tuple[int, int]) -> list[InputSquares]:
        hidden = work.inputs.read(*window, home)
        normed: Tensor = norm(hidden)
        output, read = block.with_inputs(normed.view(-1, work.sequence_length, normed.shape[-1]))
        hidden.add_(output.view_as(hidden))
        work.middle.write(window[0], hidden)
        work.total.write(window[0], hidden)
        return [InputSquares.of(one.flatten(0, 1)) for one in read]

    seen = [InputSquares.empty(group.in_features) for group in groups]
    for part in layer_pass.workers.map(at_home(layer_pass, attend), work.sequence_windows(WINDOW_TOKENS)):
        seen = [before + one for before, one in zip(seen, part, strict=True)]
    for group, squares in zip(groups, seen, strict=True):
        for linear in group.linears:
            yield linear, squares


def _mlps(layer_pass: LayerPass) -> Iterator[tuple[Linear, InputSquares]]:
    source, decoder, layer, work = layer_pass.source, layer_pass.decoder, layer_pass.layer, layer_pass.work
    home, norm_weight = layer_pass.home, source.read(layer.post_attention_norm.weight)
    norms = MadeOnce(lambda device: decoder.norm(layer, layer.post_attention_norm, norm_weight.to(device)))
    routing = Routing(source, decoder, layer, work, norms(home), home)
    if layer.routers():
        seen = InputSquares.empty(layer.post_attention_norm.size)
        for start, stop in work.middle.windows(WINDOW_TOKENS):
            seen += InputSquares.of(norms(home)(work.middle.read(start, stop, home)))
        for router in layer.routers():
            yield router, seen
    mlps = layer.mlps()

    def whole(index: int) -> list[_Part] | None:
        assignment = routing.assignment(index)
        if len(assignment.tokens) > WHOLE_TOKENS:
            return None
        if not len(assignment.tokens):
            return []
        staged = staged_weights(layer_pass, mlps[index])

        def passed(device: torch.device) -> list[_Part]:
            worker = _MlpPass(layer_pass, staged.on(device), norms(device))
            return [worker(window) for window in _windows(assignment)]

        return layer_pass.workers.lending.call(passed, mlps[index].gate.name)

    def by_window(index: int) -> Iterator[_Part]:
        worker = _MlpPass(layer_pass, staged_weights(layer_pass, mlps[index]).on(home), norms(home))
        return layer_pass.workers.map(at_home(layer_pass, worker), _windows(routing.assignment(index)))

    for index, found in enumerate(layer_pass.workers.map(whole, range(len(mlps)))):
        mlp = mlps[index]
        inputs, inner = InputSquares.empty(mlp.up.in_features), InputSquares.empty(mlp.down.in_features)
        for part in by_window(index) if found is None else found:
            inputs, inner = inputs + part.inputs, inner + part.inner
            if part.output is not None:
                # In the order of the experts, so that sums come out the same however the threads ran.
                work.total.add(part.tokens, part.output)
        yield mlp.gate, inputs
        yield mlp.up, inputs
        yield mlp.down, inner


@dataclass(frozen=True, slots=True)
class _Part:
    """An MLP on a window of its tokens; its weighted output is None where nobody needs it."""

    tokens: Tensor
    inputs: InputSquares
    inner: InputSquares
    output: Tensor | None


@dataclass(frozen=True, slots=True)
class _MlpPass:
    """Computes an MLP for a window of tokens; threads may share one."""

    layer_pass: LayerPass
    weights: GatedWeights
    norm: nn.Module

    def __call__(self, window: Assignment) -> _Part:
        normed: Tensor = window.read(self.norm(self.layer_pass.work.middle.gather(window.tokens, self.weights.device)))
        inner = self.weights.inner(normed)
        output = None
        if not self.layer_pass.is_last:
            output = window.counted(self.weights.project(inner)).cpu()
        return _Part(window.tokens, InputSquares.of(normed), InputSquares.of(inner), output)


def _windows(assignment: Assignment) -> Iterable[Assignment]:
    for start in range(0, len(assignment.tokens), WINDOW_TOKENS):
        stop = start + WINDOW_TOKENS
        yield assignment[start:stop]
