"""An importance matrix collected from the unquantized model, layer by layer, resumable at every layer.

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
from qconv.calibration.forward import Decoder
from qconv.calibration.squares import LayerPass, collect_squares
from qconv.calibration.statistics import InputSquares
from qconv.calibration.stream import LayerStream
from qconv.checkpoint.writer import is_same
from qconv.core.architecture import Architecture, Layer
from qconv.errors import VerificationError
from qconv.executors.threads import Workers
from qconv.folders.journal import Journal
from qconv.folders.ownership import claim, remove_claimed
from qconv.folders.readings import READ, SourceRecord, checksum
from qconv.formats.gguf.imatrix import Entry, Imatrix, read_imatrix, write_imatrix
from qconv.formats.gguf.names import GgufTensor, gguf_tensors

IMATRIX_NAME = "imatrix.gguf"
"""The collected matrix's file and its key in the journal."""

Progress = Callable[[str, int, int], None]


def collect_imatrix(
    source: Source,
    tokens: TokenSet,
    out: Path,
    work: Path,
    journal: Journal,
    record: SourceRecord,
    workers: Workers,
    progress: Progress,
) -> Path:
    """Collect the importance matrix into ``out``, or go on with it; its path.

    Args:
        source: The unquantized model.
        tokens: What it reads; a sequence is a chunk.
        out: The folder that gets the finished file.
        work: The folder of the activations and of each layer's sums.
        journal: Records both.
        record: What was read of the source.
        workers: Threads; each holds one expert.
        progress: Told the layer at work, the weights passed and the weights in all.

    Raises:
        CheckpointError: a weight cannot be read or is not finite.
        OutputError: the disk is full.
        VerificationError: what was collected is gone or damaged.
        UsageError: the model has no GGUF form.
    """
    sums = LayerSums(source, tokens, work, journal)
    if IMATRIX_NAME not in journal.units and any(sums_key(layer) not in journal.units for layer in sums.layers):
        _collect_layers(sums, source, tokens, work, journal, record, workers, progress)
    return sums.merge(out)


class LayerSums:
    """Each layer's sums as a file in the work folder, until all of them become the importance matrix."""

    def __init__(self, source: Source, tokens: TokenSet, work: Path, journal: Journal) -> None:
        """Nothing is read or written yet.

        Args:
            source: The model.
            tokens: What it reads; a sequence is a chunk.
            work: The folder of the sums.
            journal: Records the finished matrix, and the sums of layers when their writer says so.
        """
        self.layers = source.architecture.layers
        self._model = source.architecture
        self._tokens = tokens
        self._work = work
        self._journal = journal

    def keep(self, layer: Layer, seen: Mapping[str, InputSquares]) -> dict[str, Any]:
        """Write what was seen of a layer's linears, by the name of their weight; what the journal is to hold of it.

        Raises:
            OutputError: the disk is full.
            UsageError: the model has no GGUF form.
        """
        tensors = (tensor for tensor in gguf_tensors(self._model) if tensor.layer == layer.index)
        path = claim(_path(self._work, layer))
        written = write_imatrix(path, self._matrix(layer_entries(tensors, seen)), self._journal.staged(path.name))
        return {"size": written.size, "sha256": written.sha256}

    def merge(self, out: Path) -> Path:
        """Make one matrix in ``out`` of all layers' sums, unless it is there; its path.

        Raises:
            OutputError: the disk is full.
            VerificationError: what was collected is gone or damaged.
        """
        path = out / IMATRIX_NAME
        if IMATRIX_NAME not in self._journal.units:
            parts = [_collected(self._work, layer, self._journal) for layer in self.layers]
            entries = ChainMap(*(cast(MutableMapping[str, Entry], part.entries) for part in parts))
            written = write_imatrix(
                path, self._matrix(entries), self._journal.staged(path.name), self._journal.announce
            )
            self._journal.commit(IMATRIX_NAME, {"size": written.size, "sha256": written.sha256})
        remove_claimed(self._work, (".bin", ".gguf"))
        return path

    def _matrix(self, entries: Mapping[str, Entry]) -> Imatrix:
        return Imatrix(entries, (self._tokens.source,), self._tokens.ids.shape[1])


def scratch_bytes(model: Architecture, tokens: TokenSet, work: Path, streams: int = 1) -> int:
    """Disk that collecting still needs: the activations, and the sums of the layers and all of them together."""
    activations = streams * tokens.ids.numel() * model.hidden_size * (2 + 2 + 2 + 4)
    linears = (linear for layer in model.layers for linear in (*layer.linears(), *layer.routers()))
    present = sum(file.stat().st_size for pattern in ("*.bin", "*.gguf") for file in work.glob(pattern))
    return max(0, activations + 2 * 4 * sum(linear.in_features for linear in linears) - present)


def layer_weights(model: Architecture) -> int:
    """The weights that the pass goes through."""
    return sum(linear.numel for layer in model.layers for linear in (*layer.linears(), *layer.routers()))


def _collect_layers(
    sums: LayerSums,
    source: Source,
    tokens: TokenSet,
    work: Path,
    journal: Journal,
    record: SourceRecord,
    workers: Workers,
    progress: Progress,
) -> None:
    model = source.architecture
    total, done = layer_weights(model), 0
    with torch.no_grad():
        stream = LayerStream(source, tokens.ids, work, journal)
    decoder = Decoder(source.checkpoint.path)
    for layer in model.layers:
        what = f"imatrix layer {layer.index}"
        progress(what, done, total)
        if layer.index < stream.next_layer:
            done += sum(linear.numel for linear in (*layer.linears(), *layer.routers()))
            continue
        space = stream.workspace(layer.index)
        layer_pass = LayerPass(source, decoder, layer, space, workers, stream.is_last(layer.index))
        seen: dict[str, InputSquares] = {}
        for linear, squares in collect_squares(layer_pass):
            seen[linear.weight] = squares
            done += linear.numel
            progress(what, done, total)
        # Once its outputs count as made nothing computes the layer again: its sums must be safe before.
        kept = sums.keep(layer, seen)
        read = checksum(source.checkpoint, read_for(source, layer), workers)
        record.commit(sums_key(layer), kept | {READ: read})
        stream.advance(layer.index)


def layer_entries(tensors: Iterable[GgufTensor], seen: Mapping[str, InputSquares]) -> dict[str, Entry]:
    """What was seen of linears, by the name of their weight in the checkpoint, as entries of the GGUF tensors."""
    entries = {}
    for tensor in tensors:
        parts = [seen[name] for name in tensor.sources if name in seen]
        if parts:
            sums = torch.stack([part.sums for part in parts]).float()
            entries[tensor.name] = Entry(sums, torch.tensor([part.tokens for part in parts], dtype=torch.float64))
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


def _path(work: Path, layer: Layer) -> Path:
    return work / f"{sums_key(layer)}.gguf"


def _collected(work: Path, layer: Layer, journal: Journal) -> Imatrix:
    path = _path(work, layer)
    require_kept(path, journal.units[sums_key(layer)], "collected")
    return read_imatrix(path)


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
