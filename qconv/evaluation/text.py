"""The text that builds are measured on: a corpus by the same names as calibration's, never the same documents.

Of ``python-stdlib`` the first :data:`HELD_BACK` documents of calibration's default order are left to calibration; the
evaluation's seed shuffles the rest. What a build was calibrated on, if its report tells that it was more or other, is
left out by name. Of other corpora calibration and evaluation should be given different files or splits.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from qconv.build import REPORT_NAME
from qconv.calibration.corpus import build_tokens, leading_bos, render_chat
from qconv.calibration.documents import STDLIB, Document, documents
from qconv.checkpoint.reader import read_json
from qconv.errors import QconvError, UsageError
from qconv.evaluation.suites import TextSettings
from qconv.evaluation.windows import Encoded, WindowedText, cut, encode
from qconv.recipe import CalibrationSettings
from qconv.runtime.tokenizer import load_tokenizer

HELD_BACK = 192
"""Documents of the standard library that are calibration's; the packaged recipes use 64."""
SHORTEST = 64
"""Tokens of a document; less gives hardly any context."""


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
    encoded = (one for one in (_encode(tokenizer, document) for document in kept) if len(one.ids) >= SHORTEST)
    text = cut(
        encoded,
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


def calibrated_on(build: Path, corpus: str) -> frozenset[str]:
    """Names of the documents of ``corpus`` that a build was calibrated on; empty if it tells of none."""
    try:
        recipe = read_json(build / REPORT_NAME)["recipe"]
        settings = CalibrationSettings.model_validate(recipe["calibration"])
        calibrated = recipe["method"] != "rtn" and settings.corpus == corpus
    except (QconvError, KeyError, TypeError, ValueError):
        return frozenset()
    return frozenset(build_tokens(settings, build).documents) if calibrated else frozenset()


def _evaluated(corpus: str, seed: int) -> Iterator[Document]:
    if corpus != STDLIB:
        return documents(corpus, seed)
    rest = list(islice(documents(corpus, CalibrationSettings().seed), HELD_BACK, None))
    random.Random(seed).shuffle(rest)
    return iter(rest)


def _encode(tokenizer: Any, document: Document) -> Encoded:
    if isinstance(document.content, list):
        return encode(tokenizer, document.name, render_chat(tokenizer, document), control_tokens=True)
    return encode(tokenizer, document.name, "".join(chain(document.pieces())))
