"""The activations between layers, on disk, and how a resumed run goes on from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qconv.artifacts.source import Source
from qconv.calibration.activations import ActivationFile
from qconv.calibration.layer import Workspace, inputs_file
from qconv.checkpoint.writer import is_same
from qconv.core.devices import Lending
from qconv.folders.journal import Journal


class LayerStream:
    """Hands the calibration tokens from layer to layer.

    The inputs of one layer at a time are on disk and in the journal. What a layer computes before they are its outputs'
    may be computed once more after a crash, to the same bits.
    """

    def __init__(
        self,
        source: Source,
        ids: Tensor,
        work: Path,
        journal: Journal,
        *,
        lending: Lending | None = None,
        reference: bool = False,
    ) -> None:
        """Find the activations to go on from, or make those of layer 0 from the embeddings.

        Args:
            source: The model.
            ids: int32 [sequences, sequence_length].
            work: The folder of the activations.
            journal: Says which of them are complete.
            lending: The devices: what a layer makes stays on the first one where its memory has room; None for files.
            reference: Whether the unquantized model's activations go along.

        Raises:
            CheckpointError: the embeddings cannot be read.
            OutputError: the disk is full or the work folder cannot be written.
        """
        self._source = source
        self._ids = torch.cat([ids, ids]) if reference else ids
        self._resident: Workspace | None = None
        self._reference = reference
        self._work = work
        self._journal = journal
        self._resident = None if lending is None else self._settled(lending)
        self.next_layer = self._find_or_start()

    def is_last(self, index: int) -> bool:
        """Whether no layer follows that would need the layer's output."""
        return index + 1 == len(self._source.architecture.layers)

    def workspace(self, index: int) -> Workspace:
        """The files of a layer.

        Raises:
            OutputError: the disk is full.
        """
        work = self._whole(index)
        for scratch in () if self._resident is not None else (work.middle, work.total):
            if not scratch.path.exists() or scratch.path.stat().st_size != scratch.nbytes:
                scratch.create()
        return work.with_reference() if self._reference else work

    def _whole(self, index: int) -> Workspace:
        tokens, length = self._ids.numel(), self._ids.shape[1]
        work = Workspace.at(self._work, index, tokens, length, self._source.architecture.hidden_size)
        if self._resident is not None:
            work = replace(work, middle=self._resident.middle, total=self._resident.total)
        return work

    def _settled(self, lending: Lending) -> Workspace | None:
        """The memory of all layers' middle and running output on the first device; None where it has no room."""
        work = self._whole(0)
        return work.resident(lending.devices[0]) if lending.has_room(work.scratch_bytes) else None

    def advance(self, index: int) -> None:
        """Make the layer's running output the next layer's input, on disk and in the journal.

        Raises:
            OutputError: the disk is full.
        """
        work = self._whole(index)
        if not self.is_last(index):
            following = self._inputs(index + 1).create()
            for start, stop in following.windows():
                following.write(start, work.total.read(start, stop))
            self._seal(index + 1, following)
        work.inputs.path.unlink(missing_ok=True)
        self.next_layer = index + 1

    def _inputs(self, index: int) -> ActivationFile:
        return inputs_file(self._work, index, self._ids.numel(), self._source.architecture.hidden_size)

    def _find_or_start(self) -> int:
        embedding = self._source.architecture.embedding.weight
        for index, record in self._journal.activations.items():
            path = self._inputs(index).path
            # Of the embedding nothing need be committed yet: whether it is still the same must be seen here.
            same = index > 0 or record["read"] == self._source.checkpoint.crc32(embedding)
            if same and is_same(path, record["size"], record["sha256"]):
                return index
        first, read = self._inputs(0).create(), self._source.checkpoint.crc32(embedding)
        ids = self._ids.flatten().long()
        for start, stop in first.windows():
            first.write(start, self._source.checkpoint.gather(embedding, ids[start:stop]).float())
        self._seal(0, first, read)
        return 0

    def _seal(self, index: int, file: ActivationFile, read: int | None = None) -> None:
        self._journal.commit_activations(index, file.nbytes, file.seal(), read)
