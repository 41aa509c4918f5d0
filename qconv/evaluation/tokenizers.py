"""Whether a build reads as its reference does: another tokenizer or chat template moves scores more than 4 bits do."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from qconv.calibration.documents import STDLIB, documents
from qconv.evaluation.record import Artifact
from qconv.runtime.tokenizer import load_tokenizer

_DOCUMENTS = 20
_CHAT = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Größer als π? 🙂"},
]


def difference(build: Artifact, reference: Artifact) -> str | None:
    """How the build's tokenizer or chat template differs from the reference's in what it does; None if it does not.

    Files that are equal are not tried.

    Raises:
        CheckpointError: a tokenizer cannot be loaded.
    """
    if build.tokenizer_sha256 == reference.tokenizer_sha256:
        return None
    ours, theirs = (load_tokenizer(Path(one.path)) for one in (build, reference))
    texts = ["".join(document.pieces()) for document in islice(documents(STDLIB, 0), _DOCUMENTS)]
    for text in (*texts, *(str(message["content"]) for message in _CHAT)):
        if ours(text).input_ids != theirs(text).input_ids:
            return "its tokenizer gives other tokens than the reference's"
    return None if _rendered(ours) == _rendered(theirs) else "its chat template is another than the reference's"


def _rendered(tokenizer: Any) -> str | None:
    if tokenizer.chat_template is None:
        return None
    return str(tokenizer.apply_chat_template(_CHAT, tokenize=False, add_generation_prompt=True))
