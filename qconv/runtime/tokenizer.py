"""The tokenizer of a model on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qconv.errors import CheckpointError
from qconv.gguf.reader import GgufModel
from qconv.runtime.files import is_gguf
from qconv.source import TOKENIZER_FILES


def load_tokenizer(path: str | Path) -> Any:
    """transformers' tokenizer of a model; of a GGUF model the files beside it, if any, or the one in its metadata.

    Raises:
        CheckpointError: there is none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    path = Path(path)
    folder = path if path.is_dir() else path.parent
    options: dict[str, str] = {}
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        if not is_gguf(path):
            raise CheckpointError(f"{path}: no tokenizer.", hint="Copy the original model's tokenizer files there.")
        options["gguf_file"] = GgufModel.open(path).files[0].name
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path}: transformers cannot read its tokenizer: {error}.",
            hint="Put the tokenizer files of the original model beside it.",
        ) from error
