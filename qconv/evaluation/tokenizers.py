"""Whether a build reads as its reference does: another tokenizer or chat template moves scores more than 4 bits do."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from qconv.calibration.documents import STDLIB, documents
from qconv.chat.templates import ChatTemplates, RefusedChatError
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
    same = _rendered(ours, build) == _rendered(theirs, reference)
    return None if same else "its chat template is another than the reference's"


def _rendered(tokenizer: Any, artifact: Artifact) -> dict[str, str]:
    """What each of the model's chat templates makes of a chat, by name; a refusal is an answer too."""
    found = {}
    with ChatTemplates(tokenizer, artifact.path) as chats:
        for name in chats.names:
            for chat in (_CHAT, _CHAT[1:]):  # some templates know no system's turn
                try:
                    found[f"{name} {len(chat)}"] = chats.render(chat, answer=True, name=name)
                except RefusedChatError:
                    found[f"{name} {len(chat)}"] = "refused"
    return found
