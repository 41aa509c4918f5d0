"""A tokenizer.json's vocabulary as a GGUF file holds it: a text and a type for every row of the embedding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from qconv.boundary.printable import name_of
from qconv.errors import CheckpointError, UsageError

REDOWNLOAD = "Download tokenizer.json again."


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A BPE vocabulary as a GGUF file holds it.

    Attributes:
        tokens: By id.
        types: By id.
        pre: llama.cpp's name of the pre-tokenizer.
        merges: ``left right``, the first first; of byte-level BPE.
        scores: By id, what llama.cpp merges by: the best first; of SentencePiece's BPE, else None.
        begins_with_space: Whether a space is put before a text; of SentencePiece's BPE.
    """

    tokens: Sequence[str]
    types: Sequence[TokenType]
    pre: str
    merges: Sequence[str] = ()
    scores: Sequence[float] | None = None
    begins_with_space: bool = False

    def id_of(self, token: str) -> int | None:
        """The id of a token, None if there is no such token."""
        return self.tokens.index(token) if token in self.tokens else None


def read_tokens(path: Path, described: dict[str, Any], rows: int) -> tuple[list[str], list[TokenType]]:
    """Every row's token and type. llama.cpp aborts the process where two have the same text.

    Raises:
        CheckpointError: malformed, two tokens share an id or a text, or an id is no row.
        UsageError: an added token that llama.cpp would find elsewhere.
    """
    found: dict[int, tuple[str, TokenType]] = {}
    of_text: dict[str, int] = {}

    def add(token: Any, number: Any, kind: TokenType) -> None:
        if not isinstance(token, str) or not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise CheckpointError(
                f"{path}: token {shown(token)} with id {shown(number)} is malformed.", hint=REDOWNLOAD
            )
        if "\0" in token:
            raise unsupported(path, f"a token with a NUL, {shown(token)}")
        if number >= rows:
            raise CheckpointError(
                f"{path}: token {shown(token)} has id {number}, the embedding has {rows} rows.",
                hint="Tokenizer and weights belong to different models.",
            )
        if of_text.setdefault(token, number) != number:
            raise CheckpointError(
                f"{path}: token {shown(token)} is there twice, as {of_text[token]} and as {number}.",
                hint="llama.cpp aborts on such a file: rename one of them.",
            )
        if number in found and found[number][0] != token:
            raise CheckpointError(
                f"{path}: tokens {shown(found[number][0])} and {shown(token)} have the same id {number}.",
                hint=REDOWNLOAD,
            )
        found[number] = (token, kind)

    vocabulary = described["model"].get("vocab")
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise CheckpointError(f"{path}: no vocabulary.", hint=REDOWNLOAD)
    for token, number in vocabulary.items():
        add(token, number, TokenType.NORMAL)
    added = described.get("added_tokens") or []
    if not isinstance(added, list):
        raise CheckpointError(f"{path}: added_tokens are {shown(added)}, not a list.", hint=REDOWNLOAD)
    for entry in added:
        if not isinstance(entry, dict):
            raise CheckpointError(f"{path}: added token {shown(entry)} is malformed.", hint=REDOWNLOAD)
        stripping = [flag for flag in ("lstrip", "rstrip", "single_word") if entry.get(flag)]
        if stripping:
            raise unsupported(path, f"added token {shown(entry.get('content'))} with {stripping[0]}")
        kind = TokenType.CONTROL if entry.get("special") else TokenType.USER_DEFINED
        add(entry.get("content"), entry.get("id"), kind)
    for number in range(rows):
        if number not in found:
            add(f"[PAD{number}]", number, TokenType.UNUSED)
    return [found[number][0] for number in range(rows)], [found[number][1] for number in range(rows)]


def read_merges(path: Path, merges: Any) -> list[tuple[str, str]]:
    """Pairs of texts, the first to be merged first; newer files hold pairs, older ones the joined text.

    Raises:
        CheckpointError: one is no pair, or a part is empty or holds a space.
        UsageError: there are none.
    """
    if not isinstance(merges, list) or not merges:
        raise unsupported(path, "a tokenizer without merges")
    pairs = []
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        sound = isinstance(parts, list) and len(parts) == 2
        if not sound or not all(isinstance(part, str) and part and " " not in part for part in parts):
            raise CheckpointError(f"{path}: merge {shown(merge)} is malformed.", hint=REDOWNLOAD)
        pairs.append((parts[0], parts[1]))
    return pairs


def require_tokens(path: Path, merges: Iterable[tuple[str, str]], tokens: Iterable[str]) -> None:
    """Check that what is merged are tokens, and what comes of it: tokenizers loads no other file.

    Raises:
        CheckpointError: one is none.
    """
    known = {*tokens}
    for left, right in merges:
        for part in (left, right, left + right):
            if part not in known:
                raise CheckpointError(
                    f"{path}: merge {shown([left, right])}: {shown(part)} is no token.", hint=REDOWNLOAD
                )


def shown(value: Any) -> str:
    """A value of tokenizer.json for a message, cut where it is long."""
    return name_of(repr(value), 80)


def unsupported(path: Path, what: str) -> UsageError:
    """That llama.cpp has no such tokenizer."""
    return UsageError(
        f"{path}: {what}, which llama.cpp does not follow.",
        hint="It would tokenize differently from transformers; this tokenizer cannot be written as GGUF.",
    )
