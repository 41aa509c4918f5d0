"""Scoring a model that is larger than memory: all sequences pass one layer before the next is read.

    for window in stream_windows(path, sequences):      # or stream_logits for whole sequences
        window.logits                                    # float32 [tokens, vocabulary]

What is in memory at once
    The activations of a window of tokens, the dense attention weights of one layer, one expert, and a window of logits;
    all other activations lie in a file. Nothing grows with the number of layers, experts or sequences.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qconv.calibration.activations import ActivationFile
from qconv.calibration.forward import RunningLayer
from qconv.core.architecture import Layer, Linear, Moe
from qconv.errors import UsageError
from qconv.models.calls import Calls
from qconv.models.gating import Gating
from qconv.runtime.activations import InputRounding
from qconv.runtime.backends import Backend, get_backend
from qconv.runtime.backends.routing import routed
from qconv.runtime.dequantized import Dequantized
from qconv.runtime.files import ModelFiles, open_files
from qconv.runtime.loading import chosen_dtype
from qconv.runtime.modules import PackedExperts
from qconv.runtime.rounded import RoundedLinear
from qconv.runtime.skeleton import Installer, empty_model, place_rotary

WINDOW_TOKENS = 4096
"""Tokens that pass the experts together; each window reads the layer's experts once."""
LOGIT_BYTES = 2**28
"""Logits that are made at once: 441 tokens of a vocabulary of 151,936."""
HEAD_ROWS = 8192
"""Rows of the head that are in memory at once."""

Progress = Callable[[int, int], None]
"""Called with the number of layers done, and of all."""


@dataclass(frozen=True, slots=True)
class LogitWindow:
    """Logits of neighbouring tokens.

    Attributes:
        sequence: Which sequence, by its place in the list.
        start: The first token's place in it.
        logits: float32 [tokens, vocabulary]; row i is about the token after ``start + i``.
    """

    sequence: int
    start: int
    logits: Tensor


def stream_logits(path: str | Path, sequences: Sequence[Tensor], **options: Any) -> Iterator[Tensor]:
    """The logits of each sequence in order, float32 [length, vocabulary]; arguments as of :func:`stream_windows`.

    Raises:
        CheckpointError, UsageError, OutputError: as :func:`stream_windows`.
    """
    parts: list[Tensor] = []
    for window in stream_windows(path, sequences, **options):
        parts.append(window.logits)
        if window.start + len(window.logits) == len(sequences[window.sequence]):
            yield torch.cat(parts)
            parts.clear()


def stream_windows(
    path: str | Path,
    sequences: Sequence[Tensor],
    *,
    backend: str = "auto",
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    scratch: Path | None = None,
    progress: Progress | None = None,
    round_inputs: bool = False,
) -> Iterator[LogitWindow]:
    """Score sequences; nothing is computed before the first window is asked for.

    Args:
        path: As of :func:`qconv.runtime.loading.load`.
        sequences: Token ids, int64 [length] each; every token sees those before it in its own sequence.
        backend: As of ``load``.
        dtype: As of ``load``.
        device: As of ``load``.
        scratch: A folder with room for all activations, ``tokens * hidden_size`` of the dtype; by default the system's
            folder for temporary files.
        progress: Told after each layer.
        round_inputs: As of ``load``.

    Raises:
        CheckpointError: the files are damaged, incomplete or of a kind that qconv does not run.
        UsageError: no such backend, device or dtype; a sequence that is empty or names a token that there is not.
        OutputError: the scratch folder is full.
    """
    files = open_files(Path(path))
    placed = get_backend(backend, device)
    scorer = _Scorer(files, placed, chosen_dtype(files, dtype), round_inputs)
    _check_ids(sequences, files.architecture.embedding.out_features)
    with tempfile.TemporaryDirectory(prefix="qconv-", dir=scratch) as folder:
        yield from scorer.windows(sequences, Path(folder) / "activations", progress)


class _Scorer:
    def __init__(self, files: ModelFiles, backend: Backend, dtype: torch.dtype, round_inputs: bool) -> None:
        self.files = files
        self.backend = backend
        self.dtype = dtype
        self.model = empty_model(files, dtype)
        self.installer = Installer(self.model, Dequantized(files, dtype), backend, dtype, round_inputs)
        place_rotary(self.model.model, backend.device)
        self.calls = Calls(self.model.model, files.architecture.hidden_size)

    @torch.no_grad()
    def windows(self, sequences: Sequence[Tensor], path: Path, progress: Progress | None) -> Iterator[LogitWindow]:
        architecture = self.files.architecture
        starts = [0]
        for sequence in sequences:
            starts.append(starts[-1] + len(sequence))
        spans = list(pairwise(starts))
        hidden = ActivationFile(path, starts[-1], architecture.hidden_size, self.dtype).create()
        for (start, _), sequence in zip(spans, sequences, strict=True):
            hidden.write(start, self.files.gather(architecture.embedding, sequence).to(self.dtype))
        for number, layer in enumerate(architecture.layers, start=1):
            self._pass(layer, hidden, spans)
            if progress is not None:
                progress(number, len(architecture.layers))
        yield from self._logits(hidden, spans)

    def _pass(self, layer: Layer, hidden: ActivationFile, spans: Sequence[tuple[int, int]]) -> None:
        """One layer: attention sequence by sequence, then the MLP by windows of tokens of any sequence."""
        module = self._installed(layer)
        for start, stop in spans:
            before = self._read(hidden, start, stop)
            hidden.write(start, (before + module.mixed(before))[0])
        for start, stop in hidden.windows(WINDOW_TOKENS):
            before = self._read(hidden, start, stop)
            hidden.write(start, (before + module.fed(before))[0])
        self.model.model.layers[layer.index] = nn.Identity()  # frees the layer

    def _installed(self, layer: Layer) -> RunningLayer:
        self.installer.around_experts(layer)
        if isinstance(layer.mlp, Moe):
            name = layer.mlp.experts_name
            self.installer.check_experts(layer.mlp)
            gating = self.installer.gating(name)
            experts = StreamedExperts(self.files, layer.mlp, self.backend, gating, self.installer.rounding)
            self.installer.replace(name, PackedExperts(experts, len(layer.mlp.experts)))
        return RunningLayer.of(self.model.model.layers[layer.index], self.calls, layer, self.files.architecture)

    def _read(self, hidden: ActivationFile, start: int, stop: int) -> Tensor:
        """[1, tokens, hidden] on the device."""
        return hidden.read(start, stop).unsqueeze(0).to(self.backend.device, self.dtype)

    def _logits(self, hidden: ActivationFile, spans: Sequence[tuple[int, int]]) -> Iterator[LogitWindow]:
        architecture = self.files.architecture
        self.installer.norm(architecture.final_norm)
        norm = self.model.get_submodule(architecture.held_name(architecture.final_norm.name))
        head = architecture.lm_head or architecture.embedding
        tokens = max(1, LOGIT_BYTES // (4 * head.out_features))
        for number, (first, last) in enumerate(spans):
            for start in range(first, last, tokens):
                stop = min(start + tokens, last)
                states = norm(self._read(hidden, start, stop))[0]
                logits = torch.empty(stop - start, head.out_features)
                for row in range(0, head.out_features, HEAD_ROWS):
                    rows = slice(row, min(row + HEAD_ROWS, head.out_features))
                    weight = self.files.rows(head, rows.start, rows.stop).dequantize(self.dtype)
                    logits[:, rows] = functional.linear(states, weight.to(states.device))
                yield LogitWindow(number, start - first, logits)


@dataclass(frozen=True, slots=True)
class StreamedExperts:
    """Experts that are read from the files when tokens choose them, one at a time, and dropped again."""

    files: ModelFiles
    moe: Moe
    backend: Backend
    gating: Gating
    rounding: Callable[[Linear], InputRounding | None]

    def __call__(self, inputs: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return routed(inputs, chosen, weights, len(self.moe.experts), self._expert)

    def _expert(self, expert: int, inputs: Tensor) -> Tensor:
        mlp = self.moe.experts[expert]
        gate, up = self._linear(mlp.gate)(inputs), self._linear(mlp.up)(inputs)
        return self._linear(mlp.down)(self.gating(gate, up))

    def _linear(self, linear: Linear) -> RoundedLinear:
        bias = self.files.bias(linear) if linear.bias else None
        bias = None if bias is None else bias.to(self.backend.device)
        return RoundedLinear(self.backend.linear(self.files.weight(linear)), self.rounding(linear), bias)

    def tensors(self) -> Iterator[Tensor]:
        """None: nothing stays in memory."""
        yield from ()


def _check_ids(sequences: Sequence[Tensor], vocabulary: int) -> None:
    for number, sequence in enumerate(sequences):
        if sequence.dim() != 1 or len(sequence) == 0 or sequence.dtype != torch.int64:
            raise UsageError(f"sequence {number}: {sequence.dtype} {list(sequence.shape)}, not int64 [length].")
        if int(sequence.min()) < 0 or int(sequence.max()) >= vocabulary:
            raise UsageError(
                f"sequence {number} names token {int(sequence.max())}; the model has {vocabulary}.",
                hint="Tokenize with the model's own tokenizer.",
            )
