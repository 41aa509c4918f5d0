"""transformers' tokenizer of a folder, and what it puts before a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qconv.boundary.printable import one_line, printable
from qconv.checkpoint.tiktoken import as_files, has_ranks
from qconv.errors import CheckpointError

_HINT = "Copy the model's tokenizer files and config.json again."


def load_tokenizer(folder: Path, *, gguf_file: str | None = None) -> Any:
    """A folder's tokenizer, from local files alone and without running code from them.

    Args:
        folder: Where its files lie.
        gguf_file: Name of the GGUF file whose metadata hold it, if no files of its own do.

    Raises:
        CheckpointError: transformers or tokenizers cannot make a tokenizer of what is there.
        UsageError: ranks of tiktoken that are not Kimi's.
    """
    from transformers import AutoTokenizer  # seconds to import

    tokenizer: Any

    if gguf_file is None and has_ranks(folder):
        with as_files(folder) as made:
            tokenizer = load_tokenizer(made)
        tokenizer.name_or_path = str(folder)
        return tokenizer
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
        # What is wrong with a setting (a length that is no number) shows only when it is used.
        tokenizer.decode(tokenizer("a").input_ids)
    # transformers and tokenizers let whatever their parsing meets escape: ValueError, KeyError, a bare Exception.
    except Exception as error:
        raise _refused(folder, error) from error
    except BaseException as error:
        # A panic of tokenizers' Rust is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise _refused(folder, error) from error
    return tokenizer


def leading_bos(tokenizer: Any) -> list[int]:
    """``[bos]`` if the tokenizer puts BOS before a text, else ``[]``."""
    ids = tokenizer("a", add_special_tokens=True).input_ids
    return ids[:1] if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else []


def rendered_bos(tokenizer: Any, rendered: str) -> str:
    """BOS, if a rendered chat begins with it though the tokenizer also puts it before a text; else nothing.

    Whoever tokenizes the text as a tokenizer does by itself would give the model two.
    """
    bos = tokenizer.bos_token
    return bos if bos and leading_bos(tokenizer) and rendered.startswith(bos) else ""


def _refused(folder: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"{printable(str(folder))}: transformers cannot load the tokenizer: {type(error).__name__}: {one_line(error)}.",
        hint=_HINT,
    )
