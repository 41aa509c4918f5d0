"""The tokenizer of a model on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qconv.content import is_gguf
from qconv.errors import CheckpointError
from qconv.gguf.reader import GgufModel
from qconv.runtime.gguf_tokenizer import gguf_tokenizer
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
    return gguf_tokenizer(GgufModel.open(path))
