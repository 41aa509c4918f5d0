"""A checkpoint, a build or a GGUF file in this process, by qconv's own runtime."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qconv import __version__
from qconv.errors import EngineError
from qconv.evaluation.engines.base import Completion, Logits, Prompt, Sampling, Step, silent
from qconv.evaluation.engines.decoding import Decoder
from qconv.runtime.files import open_files
from qconv.runtime.loading import load
from qconv.runtime.stream import stream_windows
from qconv.runtime.tokenizer import load_tokenizer

LEAST_SHARED = 1024
"""Hidden size from which a step is worth sharing between threads. Threads wait for each other a hundred times a token,
longer than a small product takes, and without end where other programs use the cores."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LocalEngine:
    """transformers' model on the weights as they lie on disk: a build's stay packed (:func:`qconv.load`).

    The model is loaded when it is first needed: what is in a cache needs none.
    """

    def __init__(
        self, path: Path, *, dtype: str = "float32", device: str = "cpu", rows: int = 8, round_inputs: bool = False
    ) -> None:
        """Say what is to be loaded.

        Args:
            path: A checkpoint or a build.
            dtype: In which all arithmetic is done: a name of :data:`DTYPES`.
            device: A torch device.
            rows: Sequences of one batch.
            round_inputs: Whether inputs are rounded as engines do that compute in FP8, where the build says so.
        """
        self.path = path
        self.rows = rows
        self._dtype, self._device, self._round_inputs = dtype, device, round_inputs
        self._tokenizer: Any = None
        self._model: Any = None

    @property
    def identity(self) -> Mapping[str, str]:
        """See :class:`~qconv.evaluation.engines.base.Engine`."""
        return {
            "engine": "local",
            "qconv": __version__,
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
            "dtype": self._dtype,
            "device": device_name(self._device, self._thread_count),
            "rows": str(self.rows),
            **({"inputs": "rounded"} if self._round_inputs else {}),
        }

    @torch.inference_mode()
    def logits(self, sequences: Sequence[Sequence[int]]) -> Iterator[Logits]:
        """Of each sequence; a batch is as long as its longest sequence."""
        for start in range(0, len(sequences), self.rows):
            group = sequences[start : start + self.rows]
            ids, mask = right_padded(group)
            try:
                with self._threads():
                    found = self._loaded()(
                        input_ids=ids.to(self._device), attention_mask=mask.to(self._device), use_cache=False
                    ).logits
            except (RuntimeError, ValueError, IndexError) as error:
                raise EngineError(f"{self.path}: the model fails on a batch of {list(ids.shape)}: {error}.") from error
            for row, sequence in zip(found, group, strict=True):
                yield row[: len(sequence)].float().cpu().numpy()

    def at(self, path: Path) -> LocalEngine:
        """The same engine on another folder's model."""
        return LocalEngine(
            path, dtype=self._dtype, device=self._device, rows=self.rows, round_inputs=self._round_inputs
        )

    def logit_windows(self, sequences: Sequence[Sequence[int]]) -> Iterator[StreamedLogits]:
        """See :class:`~qconv.evaluation.engines.base.WindowEngine`: streamed, whether the model would fit or not."""
        found = streamed_logits(
            self.path, sequences, dtype=self._dtype, device=self._device, round_inputs=self._round_inputs
        )
        while True:
            with self._threads():
                window = next(found, None)
            if window is None:
                return
            yield window

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling, step: Step = silent) -> Iterator[Completion]:
        """Every sample of every prompt; ``rows`` completions are decoded at once."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.path)
        found = Decoder(self._loaded(), self._tokenizer, self.rows).complete(prompts, sampling, step)
        while True:
            with self._threads():
                completion = next(found, None)
            if completion is None:
                return
            yield completion

    def close(self) -> None:
        """Free the model."""
        self._model = None

    @functools.cached_property
    def _thread_count(self) -> int:
        """Decided by the model alone, so that a small one gives the same numbers on any number of cores."""
        return 1 if open_files(self.path).architecture.hidden_size < LEAST_SHARED else torch.get_num_threads()

    @contextlib.contextmanager
    def _threads(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self._thread_count)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _loaded(self) -> Any:
        """The model.

        Raises:
            CheckpointError: damaged weights.
        """
        if self._model is None:
            self._model = load(
                self.path, dtype=DTYPES[self._dtype], device=self._device, round_inputs=self._round_inputs
            )
        return self._model


@dataclass(frozen=True, slots=True)
class StreamedLogits:
    """See :class:`~qconv.evaluation.engines.base.LogitWindows`."""

    sequence: int
    start: int
    logits: Logits


def streamed_logits(
    path: Path, sequences: Sequence[Sequence[int]], *, dtype: str, device: str, round_inputs: bool
) -> Iterator[StreamedLogits]:
    """Logits of a model's sequences, a bounded number of tokens at once (:mod:`qconv.runtime.stream`)."""
    ids = [torch.tensor(list(sequence)) for sequence in sequences]
    for one in stream_windows(path, ids, dtype=DTYPES[dtype], device=device, round_inputs=round_inputs):
        yield StreamedLogits(one.sequence, one.start, one.logits.numpy())


def right_padded(sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, int64 [sequences, longest] each."""
    shape = (len(sequences), max(map(len, sequences)))
    ids, mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def device_name(device: str, threads: int | None = None) -> str:
    """What computes: the GPU's name, or the processor's kind and the number of threads, by default torch's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    count = threads or torch.get_num_threads()
    return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {count} threads"
