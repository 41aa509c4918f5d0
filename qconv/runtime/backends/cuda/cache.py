"""Compiled kernels on disk, so that each is compiled once a machine.

An entry's name is the hash of all that its bytes depend on: source, headers, options, architecture, compiler version.
Its first bytes are the hash of the rest; an entry that does not match is compiled again and replaced.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from qconv.runtime.backends.cuda.compiler import Source, compile_source, compiler_version

_MAGIC = b"qconv kernel 1\n"
_DIGEST_BYTES = 32


def cache_folder() -> Path:
    """``$QCONV_CACHE/kernels``, or ``qconv/kernels`` in the user's cache folder (XDG base directories)."""
    if own := os.environ.get("QCONV_CACHE"):
        return Path(own) / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qconv" / "kernels"


def entry_name(source: Source, architecture: int, version: str) -> str:
    """The file name of a compilation's result."""
    digest = hashlib.sha256()
    parts = [source.name, source.text, *(part for header in sorted(source.headers.items()) for part in header)]
    for part in (*parts, *source.options, str(architecture), version):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return f"{digest.hexdigest()}.kernel"


def cached_cubin(
    source: Source,
    architecture: int,
    *,
    folder: Path | None = None,
    compile: Callable[[Source, int], bytes] = compile_source,
) -> bytes:
    """Machine code of a translation unit, compiled at first use.

    A folder that cannot be read or written costs time, never the result.

    Args:
        source: What to compile.
        architecture: Compute capability times ten.
        folder: The cache; by default :func:`cache_folder`.
        compile: The compiler.

    Raises:
        BackendError: the compiler is missing or refuses.
    """
    path = (folder or cache_folder()) / entry_name(source, architecture, compiler_version())
    found = _read(path)
    if found is not None:
        return found
    cubin = compile(source, architecture)
    with suppress(OSError):
        _write(path, cubin)
    return cubin


def _read(path: Path) -> bytes | None:
    """The entry's content, or None where it is missing, damaged or unreadable."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    head = len(_MAGIC) + _DIGEST_BYTES
    content = data[head:]
    valid = data[:head] == _MAGIC + hashlib.sha256(content).digest()
    return content if valid else None


def _write(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename: a reader sees a whole entry or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_MAGIC + hashlib.sha256(content).digest() + content)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
