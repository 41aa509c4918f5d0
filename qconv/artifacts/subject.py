"""A build as the rules about engines look at it: from a folder, a GGUF file, or the headers of a repository."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from qconv.artifacts.layout import quantization_section
from qconv.boundary.content import is_gguf
from qconv.chat.files import templates_of
from qconv.checkpoint.generation_config import GENERATION_CONFIG, read_generation_config
from qconv.checkpoint.hub import headers_of
from qconv.checkpoint.reader import Checkpoint, map_rows, read_json
from qconv.engines.subject import Stored, Subject
from qconv.formats.gguf.reader import GgufModel

QUANTIZATION_FILE = "hf_quant_config.json"


def subject_of(path: Path, remote: str | None = None) -> Subject:
    """A build on this machine.

    Args:
        path: A folder of safetensors or GGUF, or a GGUF file.
        remote: The Hub id whose small files lie at ``path``: then headers are read there, and no values.

    Raises:
        CheckpointError: a file is damaged or missing, or the repository has no headers to read.
    """
    if remote is None and is_gguf(path):
        return _of_gguf(path)
    if remote is not None:
        stored = {name: Stored(dtype, shape) for name, (dtype, shape) in headers_of(remote).items()}
        return subject_of_folder(path, read_json(path / "config.json"), stored)
    checkpoint = Checkpoint.open(path)
    entries = checkpoint.entries
    stored = {name: Stored(one.dtype_name, one.shape) for name, one in entries.items()}

    def read(name: str) -> Tensor:
        entry = entries[name]
        return map_rows(entry, 0, min(1, entry.shape[0])) if entry.shape else checkpoint.read(name)

    return replace(subject_of_folder(path, checkpoint.config, stored), read=read)


def subject_of_folder(path: Path, config: Mapping[str, Any], stored: Mapping[str, Stored]) -> Subject:
    """A build of safetensors by its config.json and headers, with what lies in a folder beside them.

    Raises:
        CheckpointError: a small file is malformed.
    """
    inner = read_json(path / QUANTIZATION_FILE) if (path / QUANTIZATION_FILE).is_file() else None
    settings = path / "tokenizer_config.json"
    templates = templates_of(path, read_json(settings) if settings.is_file() else {})
    return Subject(
        config=config,
        section=quantization_section(path, config),
        tensors=stored,
        files=frozenset(file.name for file in path.iterdir()),
        generation=read_generation_config(path) if (path / GENERATION_CONFIG).exists() else None,
        quantization_file=inner,
        template="\n".join(templates.values()) if templates else None,
    )


def _of_gguf(path: Path) -> Subject:
    model = GgufModel.open(path)
    template = model.metadata.get("tokenizer.chat_template")
    return Subject(
        config={},
        section=None,
        tensors={name: Stored(one.type.name, one.shape) for name, one in model.entries.items()},
        files=frozenset(file.name for file in model.files),
        keys=model.metadata,
        template=template if isinstance(template, str) else None,
    )
