"""Calibration over all layers: the activations between them on disk, and how a resumed run goes on from them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from qconv.calibration.activations import ActivationFile
from qconv.calibration.attention import calibrate_attention
from qconv.calibration.corpus import TokenSet
from qconv.calibration.experts import calibrate_mlps
from qconv.calibration.forward import Decoder
from qconv.calibration.layer import Finished, LayerContext, Workspace, inputs_file
from qconv.checkpoint.writer import sha256_of
from qconv.manifest import Journal
from qconv.models.base import Layer
from qconv.parallel import Workers
from qconv.plan import BuildPlan, Unit
from qconv.source import Source


class Calibration:
    """Runs layers in order, each on the outputs of the one before.

    The inputs of one layer at a time are journalled. A layer that was committed before its outputs were is computed
    once more, to the same bits, and not written again.
    """

    def __init__(
        self, source: Source, plan: BuildPlan, tokens: TokenSet, work: Path, journal: Journal, workers: Workers
    ) -> None:
        """Find the activations to go on from, or make those of layer 0 from the embeddings.

        Raises:
            OutputError: the disk is full or the work folder cannot be written.
        """
        self._source = source
        self._plan = plan
        self._tokens = tokens
        self._work = work
        self._journal = journal
        self._workers = workers
        self._decoder = Decoder(source.checkpoint.path)
        with torch.no_grad():
            self.next_layer = self._find_or_start()

    def context(self, unit: Unit, layer: Layer) -> LayerContext:
        """What the calibration of a layer works on."""
        quantized = frozenset(item.module.name for item in unit.items if item.quantized)
        return LayerContext.of(
            self._source,
            self._decoder,
            self._plan.recipe,
            self._plan.grid,
            layer,
            self._workspace(layer.index),
            self._workers,
            quantized,
            is_last=self._is_last(layer.index),
        )

    def modules(self, context: LayerContext) -> Iterator[Finished]:
        """The layer's modules, quantized, in the order of the plan; afterwards its running output is complete.

        Raises:
            CheckpointError: a weight is not finite.
            OutputError: the disk is full.
        """
        with torch.no_grad():
            yield from calibrate_attention(context)
            yield from calibrate_mlps(context)

    def advance(self, context: LayerContext) -> None:
        """Make the layer's output the next layer's input, on disk and in the journal.

        Raises:
            OutputError: the disk is full.
        """
        index = context.layer.index
        if not self._is_last(index):
            following = self._inputs(index + 1).create()
            for start, stop in following.windows():
                following.write(start, context.work.total.read(start, stop))
            self._seal(index + 1, following)
        context.work.inputs.path.unlink(missing_ok=True)
        self.next_layer = index + 1

    def _is_last(self, index: int) -> bool:
        return index + 1 == len(self._plan.architecture.layers)

    def _inputs(self, index: int) -> ActivationFile:
        return inputs_file(self._work, index, self._tokens.ids.numel(), self._plan.architecture.hidden_size)

    def _workspace(self, index: int) -> Workspace:
        tokens, length = self._tokens.ids.numel(), self._tokens.ids.shape[1]
        work = Workspace.at(self._work, index, tokens, length, self._plan.architecture.hidden_size)
        for scratch in (work.middle, work.total):
            if not scratch.path.exists() or scratch.path.stat().st_size != scratch.nbytes:
                scratch.create()
        return work

    def _find_or_start(self) -> int:
        for index, record in self._journal.activations.items():
            path = self._inputs(index).path
            if path.exists() and path.stat().st_size == record["size"] and sha256_of(path) == record["sha256"]:
                return index
        first = self._inputs(0).create()
        embedding = self._plan.architecture.embedding.weight
        ids = self._tokens.ids.flatten().long()
        for start, stop in first.windows():
            first.write(start, self._source.checkpoint.gather(embedding, ids[start:stop]).float())
        self._seal(0, first)
        return 0

    def _seal(self, index: int, file: ActivationFile) -> None:
        self._journal.commit_activations(index, file.nbytes, file.seal())
