"""Calibration tokens: documents of a corpus, tokenized and packed into sequences of equal length.

How the tokens are laid out
    Documents follow each other without padding. In one round a document gives at most ``DOCUMENT_SEQUENCES``
    sequences' worth of tokens, so that no long file crowds out the others; when every document has had its turn and
    more tokens are needed, the next round goes on where each long document stopped. The tokenizer's EOS closes every
    contribution, so that a model does not read one text as the continuation of another. A tokenizer without EOS gets
    no separator.

    With ``sequences: documents`` no sequence holds two: a document gives whole sequences, one a round, without
    separator. Of a mixture each corpus gives the sequences that it gives alone (:mod:`qconv.calibration.mixture`).

Special tokens
    A tokenizer that puts BOS before a text gets one BOS at the start of each sequence and none inside, also of chats
    whose template writes one. What looks like
    a control token inside plain text (``<|im_end|>`` in a source file) is tokenized as the characters that it is; only
    a chat template's own rendering is parsed for control tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qconv.artifacts.source import require_tokenizer
from qconv.calibration.documents import Document, documents, in_plain_form
from qconv.calibration.mixture import origins, parts
from qconv.chat.templates import ChatTemplates, RefusedChatError
from qconv.checkpoint.config import Config, language_part
from qconv.checkpoint.reader import read_json
from qconv.checkpoint.tokenizer import leading_bos
from qconv.checkpoint.tokenizer import load_tokenizer as load_folder
from qconv.core.settings import TextSettings
from qconv.errors import CheckpointError, UsageError

DOCUMENT_SEQUENCES = 1
"""Sequences' worth of tokens that a document may give in one round."""

Encode = Callable[[Document], Iterator[int]]


@dataclass(frozen=True, slots=True)
class TokenSet:
    """The exact tokens of a calibration.

    Attributes:
        ids: int32 [sequences, sequence_length].
        digest: sha256 of the shape and the ids as little-endian integers, hexadecimal.
        source: What the tokens are, for people.
        documents: Names of the documents used, in order of first use.
    """

    ids: Tensor
    digest: str
    source: str
    documents: tuple[str, ...]


def build_tokens(settings: TextSettings, model_dir: Path) -> TokenSet:
    """Exactly ``settings.tokens`` tokens of the corpus, the same for the same settings, corpus and tokenizer.

    Args:
        settings: Corpus, number of tokens, sequence length and seed.
        model_dir: The checkpoint's folder, for its tokenizer and the vocabulary size in config.json.

    Raises:
        UsageError: the corpus cannot be read or holds too few tokens, or it has chats and the tokenizer no template.
        CheckpointError: no tokenizer, or one whose ids do not fit config.json's ``vocab_size``.
    """
    vocabulary = Config(language_part(read_json(model_dir / "config.json"))).integer("vocab_size")
    rows, used = _mixed(settings, load_tokenizer(model_dir), model_dir)
    if rows.max() >= vocabulary:
        raise CheckpointError(
            f"the tokenizer of {model_dir} gives token {int(rows.max())}, but config.json has vocab_size {vocabulary}.",
            hint="Tokenizer and weights are of different models: copy the model's own tokenizer files.",
        )
    count, length = rows.shape
    return TokenSet(
        ids=torch.from_numpy(rows),
        digest=_digest(rows),
        source=f"{settings.named}, seed {settings.seed}: {count} x {length} tokens of {len(used)} documents",
        documents=used,
    )


def used_documents(settings: TextSettings, tokenizer: Any, model_dir: Path) -> tuple[str, ...]:
    """Names of the documents that :func:`build_tokens` takes, in order of first use, for any model with that tokenizer.

    Args:
        settings: As for :func:`build_tokens`.
        tokenizer: transformers' tokenizer.
        model_dir: The model's folder or GGUF file, for its chat template.

    Raises:
        UsageError: as :func:`build_tokens`.
    """
    return _mixed(settings, tokenizer, model_dir)[1]


def _mixed(
    settings: TextSettings, tokenizer: Any, model_dir: Path
) -> tuple[np.ndarray[Any, np.dtype[np.int32]], tuple[str, ...]]:
    """As :func:`_rows`, of all corpora of a mixture."""
    found = [_rows(part, tokenizer, model_dir) for part in parts(settings)]
    if len(found) == 1:
        return found[0]
    origin = origins(settings).numpy()
    rows = np.empty((len(origin), settings.sequence_length), dtype=np.int32)
    for number, (own, _) in enumerate(found):
        rows[origin == number] = own
    return rows, tuple(dict.fromkeys(name for _, used in found for name in used))


def _rows(
    settings: TextSettings, tokenizer: Any, model_dir: Path
) -> tuple[np.ndarray[Any, np.dtype[np.int32]], tuple[str, ...]]:
    """The tokens, int32 [sequences, sequence_length], and the names of the documents that gave any."""
    length, count = settings.sequence_length, settings.tokens // settings.sequence_length
    bos = leading_bos(tokenizer)
    payload = length - len(bos)  # tokens of text in a sequence
    used: dict[str, None] = {}
    with ChatTemplates(tokenizer, model_dir) as chats:
        corpus = documents(settings.named, settings.seed)
        encode = partial(_encode, tokenizer, chats, bos)
        if settings.sequences == "documents":
            stream = _whole(corpus, encode, payload, used)
        else:
            cap = DOCUMENT_SEQUENCES * length
            stream = _stream(corpus, encode, cap=cap, eos=tokenizer.eos_token_id, used=used)
        ids = np.fromiter(islice(stream, count * payload), dtype=np.int32)
    if len(ids) < count * payload:
        raise _too_short(settings, len(ids), len(ids) // payload, len(used))
    rows = ids.reshape(count, payload)
    return np.hstack([np.tile(np.array(bos, dtype=np.int32), (count, 1)), rows]), tuple(used)


def load_tokenizer(model_dir: Path) -> Any:
    """The checkpoint's own tokenizer, from local files alone and without running code from them.

    Raises:
        CheckpointError: no tokenizer files, or transformers cannot make a tokenizer of them.
    """
    require_tokenizer(model_dir)
    return load_folder(model_dir)


def _stream(
    corpus: Iterator[Document], encode: Encode, *, cap: int, eos: int | None, used: dict[str, None]
) -> Iterator[int]:
    """The tokens of all documents, round by round; records in ``used`` the documents that gave any."""
    separator = [] if eos is None else [eos]
    turns: Iterator[tuple[str, Iterator[int]]] = ((document.name, encode(document)) for document in corpus)
    while True:
        unfinished: list[tuple[str, Iterator[int]]] = []
        for name, tokens in turns:
            part = list(islice(tokens, cap))
            if not part:
                continue
            used[name] = None
            yield from part
            if part[-1:] != separator:
                yield from separator
            if len(part) == cap:
                unfinished.append((name, tokens))
        if not unfinished:
            return
        turns = iter(unfinished)


def _whole(corpus: Iterator[Document], encode: Encode, payload: int, used: dict[str, None]) -> Iterator[int]:
    """As :func:`_stream`, a sequence of one document alone; what does not fill one is left out."""
    turns: Iterator[tuple[str, Iterator[int]]] = ((document.name, encode(document)) for document in corpus)
    while True:
        unfinished: list[tuple[str, Iterator[int]]] = []
        for name, tokens in turns:
            part = list(islice(tokens, payload))
            if len(part) == payload:
                used[name] = None
                yield from part
                unfinished.append((name, tokens))
        if not unfinished:
            return
        turns = iter(unfinished)


def _encode(tokenizer: Any, chats: ChatTemplates, bos: list[int], document: Document) -> Iterator[int]:
    """The document's tokens without a leading BOS, piece by piece as they are asked for."""
    if not isinstance(document.content, list):
        pieces = (_ids(tokenizer, piece, control_tokens=False) for piece in document.pieces())
        return chain.from_iterable(pieces)
    ids = _ids(tokenizer, render_chat(chats, document), control_tokens=True)
    return iter(ids[len(bos) :] if ids[: len(bos)] == bos else ids)


def _ids(tokenizer: Any, text: str, *, control_tokens: bool) -> list[int]:
    encoding = tokenizer(text, add_special_tokens=False, split_special_tokens=not control_tokens, verbose=False)
    ids: list[int] = encoding.input_ids
    return ids


def render_chat(chats: ChatTemplates, document: Document) -> str:
    """A chat through the tokenizer's template.

    What a template refuses as it stands is given to it once more in the form that most are written for: OpenAI's has
    arguments of tool calls as a JSON text, and content in parts.

    Raises:
        UsageError: no template, or one that refuses this chat.
        CheckpointError: the template is none, or takes too much time or memory.
    """
    assert isinstance(document.content, list)
    try:
        try:
            return chats.render(document.content, tools=document.tools)
        except RefusedChatError:
            plain = in_plain_form(document.content)
            if plain == document.content:
                raise
            return chats.render(plain, tools=document.tools)
    except (RefusedChatError, UsageError) as error:
        raise UsageError(
            f"document {document.name}: the tokenizer cannot render this chat: {error.message}",
            hint="Use a corpus of plain text, repair the chat, or take a checkpoint that has its chat template.",
        ) from error


def _too_short(settings: TextSettings, found: int, sequences: int, used: int) -> UsageError:
    fits = sequences * settings.sequence_length
    other = "" if settings.sequences == "packed" else ", or shorter sequences: each is of one document"
    lower = f"Ask for at most {fits:,} tokens, or give" if fits else "Give"
    return UsageError(
        f"calibration corpus {settings.named} holds {found:,} tokens in {used} documents,"
        f" and {settings.tokens:,} were asked for.",
        hint=f"{lower} a longer text{other}.",
    )


def _digest(rows: np.ndarray[Any, np.dtype[np.int32]]) -> str:
    digest = hashlib.sha256(np.array(rows.shape, dtype="<i8").tobytes())
    digest.update(rows.astype("<i4").tobytes())
    return digest.hexdigest()
