"""Calibration over all layers, each on the outputs of the one before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from qconv.artifacts.source import Source
from qconv.calibration.attention import calibrate_attention
from qconv.calibration.corpus import TokenSet
from qconv.calibration.experts import calibrate_mlps
from qconv.calibration.forward import Decoder
from qconv.calibration.layer import Finished, LayerBuild, LayerContext
from qconv.calibration.squares import LayerPass, collect_squares
from qconv.calibration.statistics import InputSquares
from qconv.calibration.stream import LayerStream
from qconv.core.architecture import Layer, Linear
from qconv.core.settings import MATCHED, CalibrationSettings
from qconv.core.workers import Workers
from qconv.folders.journal import Journal


class Calibration:
    """Runs layers in order.

    A layer that was committed before its outputs were is computed once more, to the same bits, and not written again.
    """

    def __init__(
        self,
        source: Source,
        settings: CalibrationSettings,
        tokens: TokenSet,
        work: Path,
        journal: Journal,
        workers: Workers,
    ) -> None:
        """Find the activations to go on from, or make those of layer 0.

        Raises:
            OutputError: the disk is full or the work folder cannot be written.
        """
        self._source = source
        self._settings = settings
        self._workers = workers
        self._decoder = Decoder(source.checkpoint.path, source.architecture)
        with torch.no_grad():
            matched = settings.propagate == MATCHED
            self._stream = LayerStream(source, tokens.ids, work, journal, lending=workers.lending, reference=matched)

    @property
    def next_layer(self) -> int:
        """The index of the first layer whose outputs are not safe yet."""
        return self._stream.next_layer

    @property
    def propagates(self) -> bool:
        """Whether the next layer sees a layer's quantized outputs."""
        return bool(self._settings.propagate)

    def context(
        self, layer: Layer, builds: Sequence[LayerBuild], seen: dict[str, InputSquares] | None = None
    ) -> LayerContext:
        """What the calibration of a layer works on.

        Args:
            layer: The layer.
            builds: What is made of it; one, where the next layer sees its quantized outputs.
            seen: See :class:`LayerContext`.
        """
        if self.propagates and len(builds) != 1:
            raise ValueError("the next layer can only see the quantized outputs of one build")
        return LayerContext(
            self._source,
            self._decoder,
            self._settings,
            layer,
            self._stream.workspace(layer.index),
            self._workers,
            self._stream.is_last(layer.index),
            tuple(builds),
            seen,
        )

    def modules(self, context: LayerContext) -> Iterator[tuple[LayerBuild, Finished]]:
        """Each build's modules of the layer, quantized, in the order of the plan; then its running output is complete.

        Raises:
            CheckpointError: a weight is not finite.
            OutputError: the disk is full.
            ResourceError: a device's memory does not suffice.
        """
        with torch.no_grad(), self._fitting(context.layer):
            yield from calibrate_attention(context)
            yield from calibrate_mlps(context)

    def linears(self, context: LayerContext) -> Iterator[Linear]:
        """Pass the tokens through an unquantized layer of which nothing is made; each linear once its inputs were seen.

        Raises:
            CheckpointError: a weight cannot be read or is not finite.
            OutputError: the disk is full.
        """
        layer_pass = LayerPass(self._source, self._decoder, context.layer, context.work, self._workers, context.is_last)
        with self._fitting(context.layer):
            for linear, squares in collect_squares(layer_pass):
                context.see((linear,), squares)
                yield linear

    @contextlib.contextmanager
    def _fitting(self, layer: Layer) -> Iterator[None]:
        """Within the context, too small a memory of the first device is told as what it is."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise self._workers.lending.out_of_memory(layer.name) from error

    def advance(self, context: LayerContext) -> None:
        """Make the layer's output the next layer's input, on disk and in the journal.

        Raises:
            OutputError: the disk is full.
        """
        self._stream.advance(context.layer.index)
