"""Documents as tokens, each with the bytes of text that it stands for; a text larger than memory too.

A long text is tokenized in parts that overlap. A token of a part is the whole text's if it lies far enough from both of
the part's ends: pre-tokenizers split at lines, and no token is nearly as long as :data:`MARGIN`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Integers: TypeAlias = NDArray[np.int32]

PART = 1 << 18
"""Characters of a text that is tokenized at once; tokenizers hold 250 bytes for each."""
MARGIN = 1 << 12
"""Characters at a part's ends whose tokens are not taken; the longest tokens of vocabularies have 256."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A document as tokens.

    Attributes:
        name: Its name.
        ids: int32 [tokens].
        nbytes: int32 [tokens]; bytes of UTF-8 text that each token stands for.
    """

    name: str
    ids: Integers
    nbytes: Integers


def encode(tokenizer: Any, name: str, text: str, *, control_tokens: bool = False) -> Encoded:
    """A text's tokens without BOS, each with its bytes: those from the end of the token before it to its own end."""
    ids, ends = _tokenized(tokenizer, text, control_tokens)
    return Encoded(name, ids, _bytes_between(text, 0, ends))


def encode_pieces(tokenizer: Any, name: str, pieces: Iterator[str], most: int | None = None) -> Encoded:
    """As :func:`encode` of all pieces together, but for the memory; they are read as far as ``most`` tokens take."""
    ids, nbytes, found = [], [], 0
    text, begun, ended = "", 0, False
    while not ended and (most is None or found < most):
        parts, more = [text], 0
        while more < PART and not ended:
            piece = next(pieces, None)
            ended = piece is None
            parts.append(piece or "")
            more += len(parts[-1])
        text = "".join(parts)
        part_ids, ends = _tokenized(tokenizer, text, False)
        stop = len(text) if ended else _last_safe_end(text, ends)
        first, last = np.searchsorted(ends, [begun, stop], side="right")
        taken = slice(first if begun else 0, last)
        ids.append(part_ids[taken])
        nbytes.append(_bytes_between(text, begun, ends[taken]))
        found += len(ids[-1])
        kept = max(stop - MARGIN, 0)
        text, begun = text[kept:], stop - kept
    return Encoded(name, np.concatenate(ids)[:most], np.concatenate(nbytes)[:most])


def _tokenized(tokenizer: Any, text: str, control_tokens: bool) -> tuple[Integers, NDArray[np.int64]]:
    """Ids, and where each token ends, in characters, never before the one that precedes it."""
    fast = bool(tokenizer.is_fast)
    encoding = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=not control_tokens,
        return_offsets_mapping=fast,
        verbose=False,
    )
    ids = np.array(encoding.input_ids, dtype=np.int32)
    if fast:
        ends = np.array([end for _, end in encoding.offset_mapping], dtype=np.int64)
    else:  # each token is given its own text's share
        ends = np.cumsum([len(tokenizer.decode([one])) for one in encoding.input_ids], dtype=np.int64)
        ends = np.minimum(ends, len(text))
    return ids, np.maximum.accumulate(ends) if len(ends) else ends


def _last_safe_end(text: str, ends: NDArray[np.int64]) -> int:
    """The last end of a token before the margin at which a line ends and text begins, else the last one there."""
    before = ends[ends <= len(text) - MARGIN]
    for end in before[::-1][:MARGIN].tolist():
        if text[end - 1 : end] == "\n" and not text[end : end + 1].isspace():
            return int(end)
    return int(before[-1]) if len(before) else 0


def _bytes_between(text: str, begin: int, ends: NDArray[np.int64]) -> Integers:
    """Bytes of UTF-8 from ``begin`` or the end before to each end. A token may end within a character: that counts for
    the first token to cover it."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    lengths = np.ones(len(codes), dtype=np.uint8)
    for least in (0x80, 0x800, 0x10000):
        lengths += codes >= least
    before = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return np.diff(before[ends], prepend=before[begin]).astype(np.int32)
