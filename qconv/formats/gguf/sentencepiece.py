"""SentencePiece's BPE with bytes for unknown letters, as Llama 1 and 2, Mixtral and TinyLlama have it.

transformers writes such a tokenizer as BPE over text whose spaces are ``▁``, with every pair that makes a token among
its merges. llama.cpp knows no merges: of all neighbours whose text is a token it joins those with the best score, the
leftmost first. So a score says when a token's merges come. Two things that the one can say and the other cannot are
refused: a token's merges that lie apart in the list, and a pair that makes a token and is not in the list.

llama.cpp puts a space before every text and after every special token. A Metaspace of tokenizer.json puts none where
there is one already, and with its scheme ``first`` none after a special token: there the two differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gguf import TokenType

from qconv.formats.gguf.vocabulary import Vocabulary, read_merges, read_tokens, require_tokens, shown, unsupported

SPACE = "▁"
_UNSUPPORTED = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
_SCHEMES = ("always", "first", "never")
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def read_sentencepiece(path: Path, described: dict[str, Any], rows: int) -> Vocabulary:
    """The vocabulary of a tokenizer.json whose model is BPE with byte fallback.

    Args:
        path: Of the file, for errors.
        described: Its content.
        rows: Rows of the embedding; a vocabulary that is smaller is padded.

    Raises:
        CheckpointError: malformed, or two tokens share an id or a text, or more tokens than rows.
        UsageError: llama.cpp would tokenize otherwise; says why.
    """
    model = described["model"]
    used = [option for option in _UNSUPPORTED if model.get(option)]
    if used:
        raise unsupported(path, f"BPE with byte fallback and {used[0]} {shown(model[used[0]])}")
    begins_with_space = _begins_with_space(path, described.get("normalizer"), described.get("pre_tokenizer"))
    merges = read_merges(path, model.get("merges"))
    tokens, types = read_tokens(path, described, rows)
    require_tokens(path, merges, tokens)
    lacking = {*_BYTES}.difference(tokens)
    if lacking:
        raise unsupported(path, f"BPE with byte fallback and without a token for {min(lacking)}")
    types = [TokenType.BYTE if token in _BYTES else kind for token, kind in zip(tokens, types, strict=True)]
    scores = _scores(path, tokens, types, merges)
    return Vocabulary(tokens, types, "default", scores=scores, begins_with_space=begins_with_space)


def _begins_with_space(path: Path, normalizer: Any, pre_tokenizer: Any) -> bool:
    """Whether a space is put before a text, from the two ways of writing spaces as letters.

    Raises:
        UsageError: it is done in another way.
    """
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    match normalizer, pre_tokenizer:
        case {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, last]}, None if last == replace:
            return True
        case {"type": "Sequence", "normalizers": [only]}, None if only == replace:
            return False
        case _, None if normalizer == replace:
            return False
        case None, {"type": "Metaspace", "replacement": "▁", "split": False, **rest}:
            scheme = rest.get("prepend_scheme", "always")
            if scheme in _SCHEMES:
                return bool(scheme != "never" and rest.get("add_prefix_space", True))
    raise unsupported(path, "BPE with byte fallback whose normalizer and pre-tokenizer do more than write spaces as ▁")


def _scores(
    path: Path, tokens: Sequence[str], types: Sequence[TokenType], merges: Iterable[tuple[str, str]]
) -> list[float]:
    """By id, minus the rank of what a token's merges make; tokens that no merge makes come last.

    Raises:
        UsageError: no scores order the merges so, or pairs are missing.
    """
    ranks: dict[str, int] = {}
    pairs: dict[str, set[str]] = {}
    latest = None
    for left, right in merges:
        made = left + right
        if made != latest and made in ranks:
            raise unsupported(path, f"BPE with byte fallback whose merges into {shown(made)} lie apart")
        ranks.setdefault(made, len(ranks))
        pairs.setdefault(made, set()).add(left)
        latest = made
    known = {*tokens}
    for token, kind in zip(tokens, types, strict=True):
        if kind is not TokenType.NORMAL:
            continue
        for place in range(1, len(token)):
            left = token[:place]
            if left in known and token[place:] in known and left not in pairs.get(token, ()):
                raise unsupported(
                    path, f"BPE with byte fallback that does not merge {shown(left)} and {shown(token[place:])}"
                )
    return [-float(ranks.get(token, len(ranks))) for token in tokens]
