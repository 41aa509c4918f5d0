"""The tokenizer of a model on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import Keys

from qconv.errors import CheckpointError
from qconv.gguf.reader import GgufModel
from qconv.runtime.files import is_gguf
from qconv.source import TOKENIZER_FILES
from qconv.tokenizer import load_tokenizer as load_folder


def load_tokenizer(path: str | Path) -> Any:
    """transformers' tokenizer of a model; of a GGUF model the files beside it, if any, or the one in its metadata.

    Raises:
        CheckpointError: there is none, or transformers cannot read it.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        return load_folder(folder)
    if not is_gguf(path):
        raise CheckpointError(f"{path}: no tokenizer.", hint="Copy the original model's tokenizer files there.")
    model = GgufModel.open(path)
    tokenizer = load_folder(folder, gguf_file=model.files[0].name)
    named = _named_templates(model)
    if named:
        default = {} if tokenizer.chat_template is None else {"default": tokenizer.chat_template}
        tokenizer.chat_template = {**default, **named}
    return tokenizer


def _named_templates(model: GgufModel) -> dict[str, str]:
    """Chat templates beside the default one, which is all that transformers takes from the metadata."""
    prefix = f"{Keys.Tokenizer.CHAT_TEMPLATE}."
    return {
        key.removeprefix(prefix): value
        for key, value in model.metadata.items()
        if key.startswith(prefix) and isinstance(value, str)
    }
