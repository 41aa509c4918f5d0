"""The reference's distributions over a text, computed once and kept by content.

What decides them is the key: the reference's weights, the exact windows, the engine with its versions, dtype, device
and batch rows, and how much is kept. Whole distributions are kept while they fit :data:`WHOLE_BYTES`, else the
:data:`TOP` most probable tokens of each position with the exact mass of the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from qconv.errors import EngineError
from qconv.evaluation.cache import Cache, Entry
from qconv.evaluation.divergence import Reference
from qconv.evaluation.engines.base import Engine, Logits
from qconv.evaluation.tasks import Progress, Subject
from qconv.evaluation.windows import Window, WindowedText

WHOLE_BYTES = 2 * 10**9
TOP = 512
PART_BYTES = 1 << 26
"""About what one part of the cache holds; also what is lost when a run is killed."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of a reference for a task: how many tokens, what of each, in which folder, how many bytes."""

    task: str
    tokens: int
    kept: str
    path: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class ReferenceText:
    """The cached distributions of a reference over a text.

    Attributes:
        subject: The reference.
        text: The windows.
        top: Tokens kept of each distribution, None for all.
        parts: Consecutive ranges of windows, each a whole number of the engine's batches.
        entry: Where the parts lie.
    """

    subject: Subject
    text: WindowedText
    top: int | None
    parts: tuple[range, ...]
    entry: Entry

    @classmethod
    def open(cls, cache: Cache, subject: Subject, text: WindowedText, vocabulary: int) -> ReferenceText:
        """The entry of the cache, as far as it is filled."""
        engine = subject.engine
        whole = 4 * vocabulary * text.scored <= WHOLE_BYTES
        top = None if whole else min(TOP, vocabulary)
        key: dict[str, JsonValue] = {
            "artifact": subject.artifact.sha256,
            "windows": text.digest(),
            "engine": dict(engine.identity),
            "kept": "whole" if top is None else f"top {top}",
        }
        row_bytes = 4 * vocabulary if top is None else 8 * top
        parts = part_ranges(text.windows, engine.rows, row_bytes)
        return cls(subject, text, top, parts, cache.entry("reference", key))

    def fill(self, progress: Progress) -> None:
        """Compute what is missing."""
        for index in range(len(self.parts)):
            progress("reference", index, len(self.parts))
            if not self.entry.has(_part_name(index)):
                self.part(index)
        progress("reference", len(self.parts), len(self.parts))

    def part(self, index: int) -> Reference:
        """A part's distributions, over the scored tokens of its windows in order."""

        def make() -> dict[str, NDArray[Any]]:
            windows = [self.text.windows[one] for one in self.parts[index]]
            found = [
                Reference.of(logits, window.targets, self.top).arrays()
                for window, logits in zip(windows, scored_logits(self.subject.engine, windows), strict=True)
            ]
            return {name: np.concatenate([one[name] for one in found]) for name in found[0]}

        arrays = self.entry.arrays(_part_name(index), make)
        return Reference(arrays["logprobs"], arrays.get("ids"), arrays.get("tail"), arrays["target"])


def scored_logits(engine: Engine, windows: list[Window]) -> Iterator[Logits]:
    """Logits of the scored tokens of each window, float32 [scored, vocabulary].

    Raises:
        EngineError: the engine gave other shapes than it was asked for.
    """
    answers = engine.logits([window.ids.tolist() for window in windows])
    for window, logits in zip(windows, answers, strict=True):
        if logits.shape[0] != len(window.ids):
            raise EngineError(f"the engine gave {logits.shape[0]} logits for {len(window.ids)} tokens.")
        yield logits[window.first - 1 : -1]


def part_ranges(windows: tuple[Window, ...], rows: int, row_bytes: int) -> tuple[range, ...]:
    """Ranges of windows of about :data:`PART_BYTES`, in whole batches of ``rows`` windows."""
    ranges = []
    start, size = 0, 0
    for batch in range(0, len(windows), rows):
        stop = min(batch + rows, len(windows))
        size += row_bytes * sum(window.scored for window in windows[batch:stop])
        if size >= PART_BYTES or stop == len(windows):
            ranges.append(range(start, stop))
            start, size = stop, 0
    return tuple(ranges)


def _part_name(index: int) -> str:
    return f"part-{index:05d}.safetensors"
