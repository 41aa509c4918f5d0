"""The tokenizer of a model on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import Keys

from qconv.artifacts.source import TOKENIZER_FILES
from qconv.boundary.content import is_gguf
from qconv.checkpoint.tokenizer import load_tokenizer as load_folder
from qconv.errors import CheckpointError
from qconv.formats.gguf.reader import GgufModel
from qconv.runtime.gguf_tokenizer import gguf_tokenizer


def load_tokenizer(path: str | Path) -> Any:
    """transformers' tokenizer of a model; of a GGUF model the files beside it, if any, or the one in its metadata.

    Raises:
        CheckpointError: there is none, or transformers cannot read it.
    """
    path = Path(path)
    if _has_files(path):
        return load_folder(_folder(path))
    if not is_gguf(path):
        raise CheckpointError(f"{path}: no tokenizer.", hint="Copy the original model's tokenizer files there.")
    return gguf_tokenizer(GgufModel.open(path))


def own_tokenizer(path: Path) -> str | None:
    """What a GGUF file whose own tokenizer is taken says of how text is cut; None of every other model.

    Raises:
        CheckpointError: it is damaged.
    """
    if _has_files(path) or not is_gguf(path):
        return None
    metadata = GgufModel.open(path).metadata
    keys = (Keys.Tokenizer.MODEL, Keys.Tokenizer.PRE)
    return ", ".join(f"{key} {metadata[key]}" for key in keys if key in metadata)


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _has_files(path: Path) -> bool:
    return any((_folder(path) / name).is_file() for name in TOKENIZER_FILES)
