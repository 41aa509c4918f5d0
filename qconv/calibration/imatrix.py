"""An importance matrix of what the inputs of a model's layers were seen to be, kept layer by layer.

It holds what llama.cpp's own program collects by default: the inputs of every linear in the layers, routers included,
and neither those of the output head nor the embedding, which multiplies nothing. Each layer's sums are a file in the
work folder until all of them become one.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from qconv.artifacts.source import Source
from qconv.calibration.corpus import TokenSet
from qconv.calibration.statistics import InputSquares
from qconv.checkpoint.writer import is_same
from qconv.core.architecture import Architecture, Layer
from qconv.core.devices import CPU
from qconv.core.workers import Workers
from qconv.errors import VerificationError
from qconv.folders.ownership import claim
from qconv.folders.part import Part
from qconv.folders.readings import checksum
from qconv.formats.gguf.imatrix import Entry, Imatrix, read_imatrix, write_imatrix
from qconv.formats.gguf.names import GgufTensor, gguf_tensors

IMATRIX_NAME = "imatrix.gguf"
"""The collected matrix's file and its key in the journal."""

Progress = Callable[[str, int, int], None]


class LayerSums:
    """Each layer's sums as a file in the work folder, until all of them become the importance matrix."""

    def __init__(self, source: Source, tokens: TokenSet, part: Part) -> None:
        """Nothing is read or written yet.

        Args:
            source: The model.
            tokens: What it reads; a sequence is a chunk.
            part: Records the finished matrix, and the sums of layers when their writer says so.
        """
        self.layers = source.architecture.layers
        self._model = source.architecture
        self._tokens = tokens
        self._part = part

    def keep(self, layer: Layer, seen: Mapping[str, InputSquares]) -> dict[str, Any]:
        """Write what was seen of a layer's linears, by their name; what the journal is to hold of it.

        Raises:
            OutputError: the disk is full.
            UsageError: the model has no GGUF form.
        """
        tensors = (tensor for tensor in gguf_tensors(self._model) if tensor.layer == layer.index)
        entries = layer_entries(tensors, {f"{name}.weight": squares for name, squares in seen.items()})
        path = claim(self._path(layer))
        written = write_imatrix(path, self._matrix(entries), self._part.staged(f"{sums_key(layer)}.gguf"))
        return {"size": written.size, "sha256": written.sha256}

    def merge(self, out: Path) -> Imatrix:
        """Make one matrix in ``out`` of all layers' sums, unless it is there.

        Raises:
            OutputError: the disk is full.
            VerificationError: what was collected is gone or damaged.
        """
        path, part = out / IMATRIX_NAME, self._part
        if IMATRIX_NAME not in part.units:
            parts = [self._collected(layer) for layer in self.layers]
            entries = ChainMap(*(cast(MutableMapping[str, Entry], one.entries) for one in parts))
            written = write_imatrix(path, self._matrix(entries), part.staged(path.name), part.announce)
            part.note(IMATRIX_NAME, {"size": written.size, "sha256": written.sha256})
        for layer in self.layers:
            self._path(layer).unlink(missing_ok=True)
        return read_imatrix(path)

    def _collected(self, layer: Layer) -> Imatrix:
        path = self._path(layer)
        require_kept(path, self._part.units[sums_key(layer)], "collected")
        return read_imatrix(path)

    def _path(self, layer: Layer) -> Path:
        return self._part.scratch(f"{sums_key(layer)}.gguf")

    def _matrix(self, entries: Mapping[str, Entry]) -> Imatrix:
        return Imatrix(entries, (self._tokens.source,), self._tokens.ids.shape[1])


def sums_bytes(model: Architecture) -> int:
    """Disk that the sums of the layers, and all of them together, take."""
    linears = (linear for layer in model.layers for linear in (*layer.linears(), *layer.routers()))
    return 2 * 4 * sum(linear.in_features for linear in linears)


def layer_weights(layer: Layer) -> int:
    """The weights of a layer that a pass goes through."""
    return sum(linear.numel for linear in (*layer.linears(), *layer.routers()))


def layer_entries(tensors: Iterable[GgufTensor], seen: Mapping[str, InputSquares]) -> dict[str, Entry]:
    """What was seen of linears, by the name of their weight in the checkpoint, as entries of the GGUF tensors."""
    entries = {}
    for tensor in tensors:
        columns = None if tensor.moved is None else tensor.moved.columns
        kept = tensor.in_rows or columns is not None
        parts = [seen[name] for name in tensor.sources if name in seen and kept]
        if parts:
            sums = torch.stack([part.sums for part in parts]).float()
            sums = sums if columns is None else sums[:, columns]
            tokens = torch.tensor([part.tokens for part in parts], dtype=torch.float64, device=CPU)
            entries[tensor.name] = Entry(sums, tokens)
    return entries


def sums_key(layer: Layer) -> str:
    """The journal's key of a layer's sums."""
    return f"imatrix-{layer.index:05d}"


def blocks_key(layer: Layer) -> str:
    """The journal's key of a calibrated layer's blocks."""
    return f"layer-{layer.index:05d}"


def layer_readings(
    source: Source, workers: Workers, key: Callable[[Layer], str] = sums_key
) -> dict[str, Callable[[], str]]:
    """By the journal's keys of the layers what reads again that of which they were made, and gives its checksum."""
    return {
        key(layer): partial(checksum, source.checkpoint, read_for(source, layer), workers)
        for layer in source.architecture.layers
    }


def read_for(source: Source, layer: Layer) -> list[str]:
    """The tensors that the pass through a layer reads; the first one's inputs are made of the embedding."""
    names = [name for name, _ in layer.tensors()]
    return names if layer.index else [source.architecture.embedding.weight, *names]


def require_kept(path: Path, record: Mapping[str, Any], made: str) -> None:
    """Check that a file of the work folder is what the journal says.

    Args:
        path: The file.
        record: Its unit in the journal.
        made: What was done to get it, for the message.

    Raises:
        VerificationError: it is not.
    """
    if not is_same(path, record["size"], record["sha256"]):
        raise VerificationError(
            f"{path}: was {made} but is now missing or changed.", hint="Put it back, or start over with --restart."
        )
