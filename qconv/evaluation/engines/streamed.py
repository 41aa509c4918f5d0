"""Models larger than memory: all sequences of a call pass one layer before the next is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from qconv.errors import IncapableEngineError
from qconv.evaluation.engines.base import Completion, Logits, Prompt, Sampling, Step, silent
from qconv.evaluation.engines.local import DTYPES, LocalEngine, StreamedLogits, device_name, streamed_logits
from qconv.runtime.stream import stream_logits


class StreamEngine:
    """qconv's runtime, streaming. A call reads every weight once for each window of tokens: calls should be large."""

    def __init__(
        self, path: Path, *, dtype: str = "float32", device: str = "cpu", rows: int = 8, round_inputs: bool = False
    ) -> None:
        """As of :class:`~qconv.evaluation.engines.local.LocalEngine`; ``rows`` only counts sequences of a batch."""
        self.path = path
        self.rows = rows
        self._dtype, self._device, self._round_inputs = dtype, device, round_inputs

    @property
    def identity(self) -> Mapping[str, str]:
        """See :class:`~qconv.evaluation.engines.base.Engine`."""
        local = LocalEngine(
            self.path, dtype=self._dtype, device=self._device, rows=self.rows, round_inputs=self._round_inputs
        )
        return {**local.identity, "engine": "stream", "device": device_name(self._device)}

    def logits(self, sequences: Sequence[Sequence[int]]) -> Iterator[Logits]:
        """Of each sequence, in order."""
        ids = [torch.tensor(list(sequence)) for sequence in sequences]
        for found in stream_logits(
            self.path, ids, dtype=DTYPES[self._dtype], device=self._device, round_inputs=self._round_inputs
        ):
            yield found.numpy()

    def at(self, path: Path) -> StreamEngine:
        """The same engine on another folder's model."""
        return StreamEngine(
            path, dtype=self._dtype, device=self._device, rows=self.rows, round_inputs=self._round_inputs
        )

    def logit_windows(self, sequences: Sequence[Sequence[int]]) -> Iterator[StreamedLogits]:
        """See :class:`~qconv.evaluation.engines.base.WindowEngine`."""
        return streamed_logits(
            self.path, sequences, dtype=self._dtype, device=self._device, round_inputs=self._round_inputs
        )

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling, step: Step = silent) -> Iterator[Completion]:
        """A model that does not fit into memory is not generated with.

        Raises:
            IncapableEngineError: always.
        """
        raise IncapableEngineError(
            "--stream: generation would read the whole model for every token.",
            hint="Measure what generates without --stream, or on an endpoint.",
        )

    def close(self) -> None:
        """Nothing is held."""
