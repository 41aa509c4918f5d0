"""Text cut into windows, and which of their tokens are scored. Three rules:

``documents``
    Each document by itself. Windows of ``context`` tokens begin every ``stride`` tokens; a window scores the tokens
    that no window before it has scored, so that beyond the first window all are predicted from at least ``context -
    stride`` tokens. A document's first token is predicted only where the tokenizer puts BOS before a text.

``llama.cpp``
    As llama-perplexity counts: all text in one stream, cut into windows of ``context`` tokens that do not overlap;
    what does not fill a window is left out. Each window scores the tokens from ``context / 2 + 1`` on (257 to 511 of
    512), the predictions of its positions ``context / 2`` to ``context - 2``. Where the tokenizer puts BOS before a
    text, BOS takes the place of each window's first token.

``positions``
    The same windows, of which every token but the first is scored: what a model makes of each position. Windows are
    the units, however many documents there are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

import numpy as np

from qconv.evaluation.encoding import Encoded, Integers

Rule: TypeAlias = Literal["documents", "llama.cpp", "positions"]

LEAST_UNITS = 20
"""Documents below which windows of text are the units of resampling instead."""


@dataclass(frozen=True, slots=True)
class Window:
    """A sequence for the model, and what is scored of it.

    Attributes:
        ids: int32 [tokens].
        first: The first scored token, at least 1; the last is the last of ``ids``.
        units: int32 [scored]; index of the unit that each scored token counts for.
        nbytes: int32 [scored]; bytes of text of each.
    """

    ids: Integers
    first: int
    units: Integers
    nbytes: Integers

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return len(self.ids) - self.first

    @property
    def targets(self) -> Integers:
        """The scored tokens, int32 [scored]."""
        return self.ids[self.first :]


@dataclass(frozen=True, slots=True)
class WindowedText:
    """All that is scored.

    Attributes:
        windows: In order.
        units: Names of the units.
        unit: What a unit is.
        source: The text, for people.
    """

    windows: tuple[Window, ...]
    units: tuple[str, ...]
    unit: Literal["document", "window"]
    source: str

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return sum(window.scored for window in self.windows)

    def digest(self) -> str:
        """sha256 over every window's tokens, scored range and units, hexadecimal."""
        digest = hashlib.sha256()
        for window in self.windows:
            digest.update(np.array([len(window.ids), window.first], dtype="<i8").tobytes())
            for array in (window.ids, window.units, window.nbytes):
                digest.update(array.astype("<i4").tobytes())
        for name in self.units:
            digest.update(name.encode() + b"\n")
        return digest.hexdigest()


def most_tokens(rule: Rule, context: int, tokens: int, document_tokens: int | None) -> int | None:
    """How many tokens of one document :func:`cut` may have a use for at most; None for all."""
    return document_tokens if rule == "documents" else _stream_tokens(rule, context, tokens)


def _stream_tokens(rule: Rule, context: int, tokens: int) -> int:
    """Tokens of the stream that hold ``tokens`` scored ones."""
    return -(-tokens // (context - _first_of_stream(rule, context))) * context


def _first_of_stream(rule: Rule, context: int) -> int:
    return context // 2 + 1 if rule == "llama.cpp" else 1


def cut(
    documents: Iterable[Encoded],
    source: str,
    *,
    rule: Rule,
    context: int,
    stride: int,
    bos: Sequence[int] = (),
    tokens: int,
    document_tokens: int | None = None,
) -> WindowedText:
    """Windows of at least ``tokens`` scored tokens, or of all there are.

    Args:
        documents: Read only as far as needed; those of fewer than two tokens give nothing.
        source: What they are, for people.
        rule: See above.
        context: Tokens of a window.
        stride: Tokens between the beginnings of two windows of a document; for ``documents`` alone.
        bos: The tokenizer's BOS if it puts one before a text, else empty.
        tokens: How many tokens are to be scored.
        document_tokens: The most tokens of one document, so that no long one decides the mean; for ``documents`` alone.
    """
    if rule == "documents":
        windows, names = _document_windows(documents, context, stride, bos, tokens, document_tokens)
    else:
        windows, names = _stream_windows(documents, rule, context, bos, tokens)
    if len(names) >= LEAST_UNITS and rule != "positions":
        return WindowedText(tuple(windows), tuple(names), "document", source)
    units = [f"window {index}" for index in range(len(windows))]
    by_window = [
        Window(window.ids, window.first, np.full(window.scored, index, dtype=np.int32), window.nbytes)
        for index, window in enumerate(windows)
    ]
    return WindowedText(tuple(by_window), tuple(units), "window", source)


def _document_windows(
    documents: Iterable[Encoded], context: int, stride: int, bos: Sequence[int], tokens: int, most: int | None
) -> tuple[list[Window], list[str]]:
    windows: list[Window] = []
    names: list[str] = []
    found = 0
    for document in documents:
        ids = np.concatenate([np.array(bos, dtype=np.int32), document.ids[:most]])
        nbytes = np.concatenate([np.zeros(len(bos), dtype=np.int32), document.nbytes[:most]])
        if len(ids) < 2:
            continue
        for start, first, stop in sliding(len(ids), context, stride):
            units = np.full(stop - first, len(names), dtype=np.int32)
            windows.append(Window(ids[start:stop], first - start, units, nbytes[first:stop]))
        names.append(document.name)
        found += len(ids) - 1
        if found >= tokens:
            break
    return windows, names


def sliding(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Start, first scored token and stop of each window over ``length`` tokens; every token but the first once."""
    scored = 1
    for start in range(0, length, stride):
        stop = min(start + context, length)
        yield start, scored, stop
        scored = stop
        if stop == length:
            return


def _stream_windows(
    documents: Iterable[Encoded], rule: Rule, context: int, bos: Sequence[int], tokens: int
) -> tuple[list[Window], list[str]]:
    first, wanted = _first_of_stream(rule, context), _stream_tokens(rule, context, tokens)
    parts: list[Encoded] = []
    found = 0
    for document in documents:
        if len(document.ids) == 0:
            continue
        parts.append(document)
        found += len(document.ids)
        if found >= wanted:
            break
    if not parts:
        return [], []
    ids, nbytes = np.concatenate([part.ids for part in parts]), np.concatenate([part.nbytes for part in parts])
    owner = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.ids) for part in parts])
    windows = []
    for start, stop in pairwise(range(0, min(len(ids), wanted) + 1, context)):
        piece = ids[start:stop].copy()
        piece[: len(bos)] = bos
        windows.append(Window(piece, first, owner[start + first : stop], nbytes[start + first : stop]))
    # A document may lie wholly in tokens that no window scores.
    scored = sorted({int(unit) for window in windows for unit in window.units})
    number = {unit: index for index, unit in enumerate(scored)}
    renumbered = [
        Window(one.ids, one.first, np.array([number[int(unit)] for unit in one.units], dtype=np.int32), one.nbytes)
        for one in windows
    ]
    return renumbered, [parts[unit].name for unit in scored]
