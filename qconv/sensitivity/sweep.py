"""All layers forward, then back, each step's result a file of the work folder and a line of the journal.

Forward, the inputs of every layer are kept: bf16, ``2 * tokens * hidden`` bytes a layer. Back, one gradient is carried
in float32. Where nothing goes back, only the layer at work has its inputs on disk. Killed at any moment, a sweep goes
on from its last step and ends with the same bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qconv.artifacts.source import Source
from qconv.calibration.activations import ActivationFile
from qconv.calibration.corpus import TokenSet
from qconv.calibration.forward import Decoder
from qconv.calibration.imatrix import read_for, require_kept
from qconv.calibration.layer import Workspace, inputs_file
from qconv.calibration.squares import LayerPass, collect_squares
from qconv.checkpoint.header import TensorSpec, read_header
from qconv.checkpoint.reader import map_tensor
from qconv.checkpoint.writer import ShardWriter
from qconv.core.architecture import HEAD, Architecture, Layer
from qconv.core.workers import Workers
from qconv.folders.journal import Journal
from qconv.folders.ownership import claim
from qconv.folders.readings import READ, SourceRecord, checksum
from qconv.sensitivity.files import LayerFiles
from qconv.sensitivity.head import Head
from qconv.sensitivity.layer import LayerBackward

Progress = Callable[[str, int, int], None]
INPUTS, OUTPUTS = "input_squares", "output_gradient_squares"
"""What a statistic's name ends with: the mean square of a linear's inputs over the tokens that it saw, by column; the
sum of the squared gradients of its outputs, by row, over all tokens, divided by their number."""
SEEN = "tokens"
"""int64 [1], the tokens that a linear saw; of the embedding how often each row was read."""
SHARE = "residual_share"
"""float32 [1], the mean square of what a linear's block (attention, MLP) adds to the residual stream over that of the
stream afterwards."""
_HEAD = "head"


def forward_key(layer: Layer) -> str:
    """The journal's key of a layer that was passed."""
    return f"forward-{layer.index:05d}"


def backward_key(layer: Layer) -> str:
    """The journal's key of a layer through which the gradient was taken back."""
    return f"backward-{layer.index:05d}"


def scratch_bytes(model: Architecture, tokens: int, gradients: bool) -> int:
    """Disk that a sweep needs: inputs, of every layer where gradients go back, and what one layer works with."""
    kept, worked_with = (len(model.layers) + 1, 2 + 4 + 5 * 4) if gradients else (2, 2 + 4)
    return tokens * model.hidden_size * (2 * kept + worked_with)


@dataclass(slots=True)
class Sweep:
    """One pass over a model.

    Attributes:
        source: The model.
        tokens: The text.
        seed: Of the labels.
        work: The folder of activations, gradients and statistics.
        record: What was read of the source, and the journal.
        workers: Threads; each holds one expert.
        progress: Told the step, how many are done and how many there are: one or two a layer.
    """

    source: Source
    tokens: TokenSet
    seed: int
    work: Path
    record: SourceRecord
    workers: Workers
    progress: Progress

    @property
    def journal(self) -> Journal:
        """Of the run."""
        return self.record.journal

    @property
    def model(self) -> Architecture:
        """The architecture."""
        return self.source.architecture

    def run(self) -> dict[str, Tensor]:
        """Every statistic by its name: a linear's, a dot, and one of those above.

        Raises:
            CheckpointError: a weight cannot be read or is not finite.
            OutputError: the disk is full.
            VerificationError: what an earlier run kept is gone or damaged.
        """
        decoder, layers = Decoder(self.source.checkpoint.path, self.source.architecture), self.model.layers
        for layer in layers:
            self._show("forward through", layer, 2 * len(layers))
            if forward_key(layer) not in self.journal.units:
                self._forward(decoder, layer)
        if _HEAD not in self.journal.units and backward_key(layers[0]) not in self.journal.units:
            self._head(decoder)
        for layer in reversed(layers):
            self._show("back through", layer, 2 * len(layers))
            if backward_key(layer) not in self.journal.units:
                self._backward(decoder, layer)
        return self._all([*map(forward_key, layers), _HEAD, *map(backward_key, layers)])

    def run_forward(self) -> dict[str, Tensor]:
        """Without gradients: the same but for :data:`OUTPUTS`.

        Raises:
            CheckpointError, OutputError, VerificationError: as :meth:`run`.
        """
        decoder, layers = Decoder(self.source.checkpoint.path, self.source.architecture), self.model.layers
        for layer in layers:
            self._show("forward through", layer, len(layers))
            if forward_key(layer) not in self.journal.units:
                self._forward(decoder, layer)
            self._inputs(layer.index).path.unlink(missing_ok=True)
        if _HEAD not in self.journal.units:
            self._ends(decoder)
        return self._all([*map(forward_key, layers), _HEAD])

    def _show(self, what: str, layer: Layer, steps: int) -> None:
        done = sum(key.startswith(("forward-", "backward-")) for key in self.journal.units)
        self.progress(f"{what} layer {layer.index}", done, steps)

    def _all(self, keys: Iterable[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for key in keys:
            found |= self._statistics(key)
        return found

    def _inputs(self, index: int) -> ActivationFile:
        return inputs_file(self.work, index, self.count, self.model.hidden_size)

    def _forward(self, decoder: Decoder, layer: Layer) -> None:
        work = Workspace.at(self.work, layer.index, self.count, self.tokens.ids.shape[1], self.model.hidden_size)
        if layer.index == 0:
            self._embed(work.inputs)
        else:
            self._require(work.inputs.path, forward_key(self.model.layers[layer.index - 1]), "inputs")
        for scratch in (work.middle, work.total):
            scratch.create()
        statistics: dict[str, Tensor] = {}
        with torch.no_grad():
            for linear, squares in collect_squares(
                LayerPass(self.source, decoder, layer, work, self.workers, is_last=False)
            ):
                statistics[f"{linear.name}.{INPUTS}"] = (squares.sums / max(squares.tokens, 1)).float()
                statistics[f"{linear.name}.{SEEN}"] = torch.tensor([squares.tokens])
        statistics |= _shares(layer, work)
        following = self._inputs(layer.index + 1).create()
        for start, stop in following.windows():
            following.write(start, work.total.read(start, stop))
        read = checksum(self.source.checkpoint, read_for(self.source, layer), self.workers)
        self._commit(forward_key(layer), statistics, {READ: read}, inputs=following)

    @property
    def count(self) -> int:
        """Tokens of the text."""
        return self.tokens.ids.numel()

    def _embed(self, inputs: ActivationFile) -> None:
        ids = self.tokens.ids.flatten().long()
        inputs.create()
        for start, stop in inputs.windows():
            rows = self.source.checkpoint.gather(self.model.embedding.weight, ids[start:stop])
            inputs.write(start, rows.float())

    def _head(self, decoder: Decoder) -> None:
        last = self._outputs()
        head = Head(
            self.source,
            decoder.final_norm(self.source.read(self.model.final_norm.weight)),
            self.model.lm_head or self.model.embedding,
        )
        gradient = self._gradient(len(self.model.layers)).create()
        chance = torch.rand(self.count, dtype=torch.float64, generator=torch.Generator().manual_seed(self.seed))
        squares = torch.zeros(head.linear.out_features, dtype=torch.float64)
        inputs = torch.zeros(head.linear.in_features, dtype=torch.float64)
        with torch.no_grad():
            for start, stop in last.windows(head.window):
                self.progress("labels", start, self.count)
                slope, found, read = head.gradient(last.read(start, stop), chance[start:stop])
                gradient.write(start, slope)
                squares += found
                inputs += read
        statistics = {
            f"{HEAD}.{OUTPUTS}": (squares / self.count).float(),
            f"{HEAD}.{INPUTS}": (inputs / self.count).float(),
            f"{HEAD}.{SEEN}": torch.tensor([self.count]),
        }
        names = [self.model.final_norm.weight, head.linear.weight]
        values = {READ: checksum(self.source.checkpoint, names, self.workers)}
        self._commit(_HEAD, statistics, values, gradient=gradient)

    def _outputs(self) -> ActivationFile:
        """Of the last layer, known to be what was made."""
        last = self._inputs(len(self.model.layers))
        self._require(last.path, forward_key(self.model.layers[-1]), "inputs")
        return last

    def _ends(self, decoder: Decoder) -> None:
        """What the head reads, and how often each row of the embedding was."""
        norm, last = decoder.final_norm(self.source.read(self.model.final_norm.weight)), self._outputs()
        squares = torch.zeros(self.model.hidden_size, dtype=torch.float64)
        with torch.no_grad():
            for start, stop in last.windows():
                squares += norm(last.read(start, stop)).square().sum(0, dtype=torch.float64)
        statistics = {
            f"{self.model.embedding.name}.{SEEN}": self._counts(),
            f"{HEAD}.{INPUTS}": (squares / self.count).float(),
            f"{HEAD}.{SEEN}": torch.tensor([self.count]),
        }
        read = checksum(self.source.checkpoint, [self.model.final_norm.weight], self.workers)
        self._commit(_HEAD, statistics, {READ: read})

    def _counts(self) -> Tensor:
        """How often each token occurs, int64 [vocabulary]."""
        return torch.bincount(self.tokens.ids.flatten().long(), minlength=self.model.embedding.out_features)

    def _backward(self, decoder: Decoder, layer: Layer) -> None:
        above = self._gradient(layer.index + 1)
        following = [one for one in self.model.layers if one.index == layer.index + 1]
        self._require(above.path, backward_key(following[0]) if following else _HEAD, "gradient")
        inputs = self._inputs(layer.index)
        if layer.index:
            self._require(inputs.path, forward_key(self.model.layers[layer.index - 1]), "inputs")
        gradient = self._gradient(layer.index)
        files = LayerFiles.at(self.work, inputs, gradient, self.tokens.ids.shape[1])
        files.middle.create()
        gradient.create()
        for start, stop in gradient.windows():
            gradient.write(start, above.read(start, stop))
        seen = LayerBackward(self.source, decoder, layer, files, self.workers).run()
        statistics = {f"{name}.{OUTPUTS}": (one.sums / self.count).float() for name, one in seen.items()}
        if layer.index == 0:
            statistics |= self._of_embedding(gradient)
        self._commit(backward_key(layer), statistics, {}, gradient=gradient)
        above.path.unlink(missing_ok=True)

    def _of_embedding(self, gradient: ActivationFile) -> dict[str, Tensor]:
        """Of the embedding: its outputs' gradients by column, and how often each row was read."""
        model, squares = self.model.embedding, torch.zeros(self.model.hidden_size, dtype=torch.float64)
        for start, stop in gradient.windows():
            squares += gradient.read(start, stop).square_().sum(0, dtype=torch.float64)
        return {f"{model.name}.{OUTPUTS}": (squares / self.count).float(), f"{model.name}.{SEEN}": self._counts()}

    def _gradient(self, index: int) -> ActivationFile:
        path = self.work / f"gradient-{index:05d}.bin"
        return ActivationFile(path, self.count, self.model.hidden_size, torch.float32)

    def _commit(
        self, key: str, statistics: Mapping[str, Tensor], values: Mapping[str, str], **files: ActivationFile
    ) -> None:
        specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in statistics.items()]
        path = claim(self._path(key))
        with ShardWriter(path, specs, self.journal.staged(path.name)) as writer:
            for name, tensor in statistics.items():
                writer.write(name, tensor)
            written = writer.finish()
            writer.publish()
        sealed = {name: {"size": file.nbytes, "sha256": file.seal()} for name, file in files.items()}
        self.record.commit(key, {"size": written.size, "sha256": written.sha256, **sealed, **values})

    def _path(self, key: str) -> Path:
        return self.work / f"{key}.safetensors"

    def _statistics(self, key: str) -> dict[str, Tensor]:
        path = self._path(key)
        require_kept(path, self.journal.units[key], "made")
        return {name: map_tensor(entry) for name, entry in read_header(path).items()}

    def _require(self, path: Path, key: str, what: str) -> None:
        require_kept(path, self.journal.units[key][what], "made")


def _shares(layer: Layer, work: Workspace) -> dict[str, Tensor]:
    """:data:`SHARE` of a layer's linears, once it was passed."""
    added, after = [0.0, 0.0], [0.0, 0.0]
    for start, stop in work.inputs.windows():
        stream = [file.read(start, stop) for file in (work.inputs, work.middle, work.total)]
        for block, (before, behind) in enumerate(itertools.pairwise(stream)):
            added[block] += float((behind - before).square().sum(dtype=torch.float64))
            after[block] += float(behind.square().sum(dtype=torch.float64))
    shares = [torch.tensor([one / of if of > 0.0 else 0.0]) for one, of in zip(added, after, strict=True)]
    attention = {linear.name for linear in layer.attention.linears()}
    return {f"{linear.name}.{SHARE}": shares[linear.name not in attention] for linear in layer.linears()}
