"""The files beside a run's record: per-token arrays and completions, each named by the sha256 of its content.

So runs with equal content share them, and one that was edited is found out.
"""

from __future__ import annotations

import hashlib
import io
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from qconv.boundary.reading import parse_json
from qconv.checkpoint.writer import TEMPORARY_SUFFIX, write_atomically
from qconv.errors import ArtifactError, OutputError
from qconv.evaluation.record import AGAIN, FileRef
from qconv.folders.ownership import WORK_FOLDER, claim

FILES_FOLDER = "files"


def store(folder: Path, data: bytes, suffix: str) -> FileRef:
    """Put bytes under ``files/`` by their sha256; equal bytes are kept once.

    Raises:
        OutputError: the folder cannot be written.
    """
    digest = hashlib.sha256(data).hexdigest()
    path, work = folder / FILES_FOLDER / f"{digest}{suffix}", folder / WORK_FOLDER
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path.parent}: {error.strerror}.") from error
    if not path.exists():
        temporary = claim(work / f"{path.name}{TEMPORARY_SUFFIX}") if work.is_dir() else None
        write_atomically(path, data, temporary)
    return FileRef(name=path.name, sha256=digest, size=len(data))


def load(folder: Path, file: FileRef) -> bytes:
    """The bytes of a run's file.

    Raises:
        ArtifactError: absent, or not of that sha256.
    """
    path = folder / FILES_FOLDER / file.name
    try:
        found = path.stat()
        whole = stat.S_ISREG(found.st_mode) and found.st_size == file.size
        data = path.read_bytes() if whole else b""
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}.", hint=AGAIN) from error
    if not whole or hashlib.sha256(data).hexdigest() != file.sha256:
        raise ArtifactError(f"{path}: is damaged: its sha256 is not {file.sha256}.", hint=AGAIN)
    return data


def store_arrays(folder: Path, arrays: Mapping[str, NDArray[Any]]) -> FileRef:
    """Put named arrays under ``files/`` as one safetensors file."""
    from safetensors.numpy import save

    return store(folder, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}), ".safetensors")


def load_arrays(folder: Path, file: FileRef) -> dict[str, NDArray[Any]]:
    """What :func:`store_arrays` kept.

    Raises:
        ArtifactError: absent or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load as parse

    try:
        arrays: dict[str, NDArray[Any]] = parse(load(folder, file))
    except (SafetensorError, KeyError) as error:  # a dtype that NumPy does not have is a KeyError
        raise ArtifactError(f"{folder / FILES_FOLDER / file.name}: holds no arrays: {error}.", hint=AGAIN) from error
    return arrays


def store_json(folder: Path, value: JsonValue) -> FileRef:
    """Put a JSON value under ``files/``."""
    buffer = io.StringIO()
    json.dump(value, buffer, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    return store(folder, buffer.getvalue().encode(), ".json")


def load_json(folder: Path, file: FileRef) -> JsonValue:
    """What :func:`store_json` kept.

    Raises:
        ArtifactError: absent or damaged.
    """
    path = folder / FILES_FOLDER / file.name
    value: JsonValue = parse_json(load(folder, file), str(path), ArtifactError, hint=AGAIN)
    return value
