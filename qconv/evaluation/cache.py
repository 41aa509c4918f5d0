"""What is known from earlier runs, found by content alone: a key's values decide its folder, times never do.

An entry is filled part by part. A part counts once its sha256 lies beside it, so a killed run goes on where it stopped,
and a part that was damaged since is made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from qconv.boundary.reading import parse_json
from qconv.checkpoint.writer import TEMPORARY_SUFFIX, output_errors, write_atomically
from qconv.errors import ArtifactError, OutputError
from qconv.folders.ownership import claim

KEY_NAME = "key.json"


def default_folder() -> Path:
    """``$QCONV_CACHE``, else ``qconv`` in the user's cache folder."""
    given = os.environ.get("QCONV_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qconv"


@dataclass(frozen=True, slots=True)
class Cache:
    """A folder of entries."""

    folder: Path

    def entry(self, kind: str, key: Mapping[str, JsonValue]) -> Entry:
        """The entry of a key, made if absent.

        Raises:
            OutputError: the folder cannot be written.
        """
        text = json.dumps(key, sort_keys=True, indent=1)
        entry = Entry(self.folder / kind / hashlib.sha256(text.encode()).hexdigest(), shared=True)
        file, content = entry.path / KEY_NAME, text.encode() + b"\n"
        with output_errors(entry.path):
            entry.path.mkdir(parents=True, exist_ok=True)
            # For people, and the proof that what lies beside it is the cache's.
            if not file.exists():
                if any(not path.name.startswith(KEY_NAME) for path in entry.path.iterdir()):
                    raise OutputError(f"{entry.path}: was not made by qconv.", hint="Choose another cache.")
                write_atomically(file, content)
            elif file.read_bytes() != content:
                raise OutputError(f"{file}: was not written by qconv.", hint="Choose another cache.")
        return entry


@dataclass(frozen=True, slots=True)
class Entry:
    """A folder of parts.

    Attributes:
        path: The folder.
        shared: Whether several processes may use it at once: one makes a part, the others wait for it.
    """

    path: Path
    shared: bool = False

    def arrays(self, name: str, make: Callable[[], Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
        """A part's named arrays; made, and written durably, if absent or damaged.

        Raises:
            ArtifactError: it is whole, but holds no arrays.
            OutputError: the part cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load, save

        data = self.bytes_of(name, lambda: save({key: np.ascontiguousarray(one) for key, one in make().items()}))
        try:
            found: dict[str, NDArray[Any]] = load(data)
        except (SafetensorError, KeyError) as error:  # a dtype that NumPy does not have is a KeyError
            raise ArtifactError(f"{self.path / name}: holds no arrays: {error}.", hint=self._remedy(name)) from error
        return found

    def json(self, name: str, make: Callable[[], JsonValue]) -> JsonValue:
        """The same for a JSON value."""
        data = self.bytes_of(name, lambda: json.dumps(make(), allow_nan=False).encode())
        value: JsonValue = parse_json(data, str(self.path / name), ArtifactError, hint=self._remedy(name))
        return value

    def bytes_of(self, name: str, make: Callable[[], bytes]) -> bytes:
        """The same for bytes."""
        data = self._read(name)
        if data is not None:
            return data
        with self.held():
            data = self._read(name)
            if data is None:
                data = make()
                files = self.path / name, self._sum(name)
                if not self.shared:
                    for file in files:
                        claim(file)
                        claim(file.with_name(file.name + TEMPORARY_SUFFIX))
                self._sum(name).unlink(missing_ok=True)
                write_atomically(files[0], data)
                write_atomically(files[1], hashlib.sha256(data).hexdigest().encode())
        return data

    def has(self, name: str) -> bool:
        """Whether a part is there and whole."""
        return self._read(name) is not None

    def _read(self, name: str) -> bytes | None:
        try:
            if not (self.path / name).is_file() or not self._sum(name).is_file():
                return None
            data, expected = (self.path / name).read_bytes(), self._sum(name).read_text()
        except (OSError, UnicodeDecodeError):
            return None
        return data if hashlib.sha256(data).hexdigest() == expected else None

    def _remedy(self, name: str) -> str:
        return f"Remove {self.path / name}: it is made again."

    def _sum(self, name: str) -> Path:
        return self.path / f"{name}.sha256"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out of a shared entry; they wait."""
        if not self.shared:
            yield
            return
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
