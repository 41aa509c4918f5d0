"""The text that builds are measured on: a corpus by the same names as calibration's, never the same documents.

Of ``python-stdlib`` the first :data:`HELD_BACK` documents of calibration's default order are left to calibration; the
evaluation's seed shuffles the rest. What a build was calibrated on, if its report tells that it was more or other, is
left out by name. Of other corpora calibration and evaluation should be given different files or splits.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qconv.artifacts.reported import read_report
from qconv.calibration.corpus import render_chat, used_documents
from qconv.calibration.documents import STDLIB, Document, documents
from qconv.calibration.mixture import part_of
from qconv.chat.templates import ChatTemplates
from qconv.checkpoint.tokenizer import leading_bos
from qconv.core.settings import CalibrationSettings
from qconv.errors import QconvError, UsageError
from qconv.evaluation.encoding import Encoded, encode, encode_pieces
from qconv.evaluation.suites import TextSettings
from qconv.evaluation.windows import WindowedText, cut, most_tokens
from qconv.runtime.tokenizer import load_tokenizer

HELD_BACK = 192
"""Documents of the standard library that are calibration's; the packaged recipes use 64."""
SHORTEST = 64
"""Tokens of a document; less gives hardly any context."""
_NO_DATA = "none"
"""What a report calls the calibration data of a build without."""
LARGE = 16 << 20
"""Bytes of a file of which only as much is measured as the task asks for, though no ``document_tokens`` say so."""


def windowed_text(settings: TextSettings, model_dir: Path, seed: int, exclude: Collection[str] = ()) -> WindowedText:
    """The windows of a text task.

    Args:
        settings: Corpus, rule, sizes.
        model_dir: The model whose tokenizer counts: the reference's if there is one.
        seed: Which documents, where there are more than are needed.
        exclude: Names of documents to leave out.

    Raises:
        UsageError: the corpus cannot be read, or gives less than two windows.
        CheckpointError: no tokenizer.
    """
    tokenizer = load_tokenizer(model_dir)
    bos = leading_bos(tokenizer)
    kept = (one for one in _evaluated(settings.corpus, seed) if one.name not in exclude)
    most = most_tokens(settings.rule, settings.context, settings.tokens, settings.document_tokens)
    with ChatTemplates(tokenizer, model_dir) as chats:
        encoder = _Encoder(tokenizer, chats, bool(bos) or settings.rule != "documents", most, settings.tokens)
        text = cut(
            (one for one in map(encoder.encode, kept) if len(one.ids) >= SHORTEST),
            f"{settings.corpus}, seed {seed}",
            rule=settings.rule,
            context=settings.context,
            stride=settings.stride,
            bos=bos,
            tokens=settings.tokens,
            document_tokens=settings.document_tokens,
        )
    if len(text.windows) < 2:
        raise UsageError(
            f"corpus {settings.corpus}: {text.scored} tokens can be scored, which is less than two windows of"
            f" {settings.context}.",
            hint="Give a longer text.",
        )
    return text


def calibrated_on(build: Path, corpus: str, model_dir: Path) -> frozenset[str]:
    """Names of the documents of ``corpus`` that a build was calibrated on; empty if it tells of none.

    Args:
        build: The build's folder, or a GGUF file in it.
        corpus: The corpus that is evaluated.
        model_dir: The model whose tokenizer counts, as for :func:`windowed_text`: tokens decide how many documents it
            took.

    Raises:
        UsageError: the corpus cannot be read any more.
        CheckpointError: no tokenizer.
    """
    settings = _calibration(build if build.is_dir() else build.parent)
    part = None if settings is None else part_of(settings, corpus)
    if part is None:
        return frozenset()
    return frozenset(used_documents(part, load_tokenizer(model_dir), model_dir))


def _calibration(folder: Path) -> CalibrationSettings | None:
    """The text that a build's report says it, or its importance matrix, was made with; None where it says of none."""
    try:
        report = read_report(folder)
        if report["fingerprints"]["calibration data"] == _NO_DATA:
            return None
        text, imatrix = report["recipe"]["calibration"], report["recipe"].get("imatrix")
        if text is None and imatrix["files"]:
            return None  # nothing but others' importance matrices
        return CalibrationSettings.model_validate(text or {})
    except (QconvError, KeyError, TypeError, ValueError):
        return None


def _evaluated(corpus: str, seed: int) -> Iterator[Document]:
    if corpus != STDLIB:
        return documents(corpus, seed)
    rest = list(islice(documents(corpus, CalibrationSettings().seed), HELD_BACK, None))
    random.Random(seed).shuffle(rest)
    return iter(rest)


@dataclass(frozen=True, slots=True)
class _Encoder:
    """Documents to tokens.

    Attributes:
        tokenizer: transformers' tokenizer.
        chats: Renders chats.
        without_bos: Whether the BOS that a template writes is taken away: the tokenizer's own is put there, or none.
        most: The most tokens of a document that are of use; None for all.
        enough: So many are taken of a file larger than :data:`LARGE` where all would be of use.
    """

    tokenizer: Any
    chats: ChatTemplates
    without_bos: bool
    most: int | None
    enough: int

    def encode(self, document: Document) -> Encoded:
        """A document's tokens, without BOS, read only as far as it takes."""
        if not isinstance(document.content, list):
            large = isinstance(document.content, Path) and document.content.stat().st_size > LARGE
            most = self.enough if self.most is None and large else self.most
            return encode_pieces(self.tokenizer, document.name, document.pieces(), most)
        rendered = render_chat(self.chats, document)
        found = encode(self.tokenizer, document.name, rendered, control_tokens=True)
        bos = self.tokenizer.bos_token_id
        if not self.without_bos or bos is None or found.ids[:1].tolist() != [bos]:
            return found
        return Encoded(document.name, found.ids[1:], found.nbytes[1:])
