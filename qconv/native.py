"""C++ for the processor at hand: compiled at first use, kept in the user's cache, loaded with ctypes.

The sources travel with the package: ``kernels/cpu/NAME.cpp`` and the headers beside it. The system's compiler makes a
shared library of plain C functions from one, for exactly this processor. Calls by ctypes let go of Python's lock, so
threads run side by side.

Nothing depends on it: whoever calls a library has the same work in torch operations to fall back on. Flags forbid what
would make results depend on the processor (contraction to FMA, reordered sums); a library should give the bytes that
torch gives.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

SWITCH = "QCONV_NATIVE"
"""This environment variable set to 0 leaves everything to torch."""

EXTRA_FLAGS = "QCONV_NATIVE_FLAGS"
"""This environment variable holds further options of the compiler, such as ``-fsanitize=address``."""

FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-fPIC",
    "-shared",
)
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""As ``enum class Dtype`` of ``numbers.h`` numbers them."""
COMPILERS = ("c++", "g++", "clang++")
_PATIENCE = 600  # seconds; a few are usual

_log = logging.getLogger("qconv")
_lock = threading.Lock()


class NativeError(Exception):
    """A library cannot be had; the message says why, in half a sentence."""


def load(name: str) -> ctypes.CDLL | None:
    """The library made of ``kernels/cpu/NAME.cpp``; None where :data:`SWITCH` says so or it cannot be had.

    Why it cannot is logged as a warning, once a process.
    """
    if os.environ.get(SWITCH) == "0":
        return None
    with _lock:
        return _loaded(name)


@functools.cache
def _loaded(name: str) -> ctypes.CDLL | None:
    try:
        return build(kernels_folder() / "cpu", name, cache_folder(), compiler())
    except NativeError as error:
        _log.warning(
            "%s is left to torch, several times slower: %s. With a C++ compiler (g++, clang++ or $CXX) it is fast; "
            "%s=0 silences this.",
            name,
            error,
            SWITCH,
        )
        return None


def build(sources: Path, name: str, cache: Path, compiler: Sequence[str]) -> ctypes.CDLL:
    """Load a library from the cache, after compiling it if it is not there.

    The cached file's name holds a digest of all that its code depends on: the sources, the flags, the compiler and the
    processor, the latter two as the compiler's predefined macros tell them. It appears under that name whole or not at
    all, so processes may build at once.

    Args:
        sources: The folder of ``NAME.cpp`` and of all headers.
        name: Which one.
        cache: Where libraries are kept; made if absent.
        compiler: A command that understands GCC's options.

    Raises:
        NativeError: it does not compile, cannot be stored, or does not load.
    """
    made = cache / f"{name}-{_digest(sources, name, compiler)}.so"
    try:
        if made.exists():
            return ctypes.CDLL(str(made))
    except OSError:
        _log.debug("%s does not load and is made anew", made)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=cache) as folder:
            partial = Path(folder) / made.name
            _run([*compiler, *flags(), "-o", str(partial), str(sources / f"{name}.cpp")])
            library = ctypes.CDLL(str(partial))
            os.replace(partial, made)
    except OSError as error:
        raise NativeError(f"{made} cannot be made ({error})") from None
    return library


def compiler() -> list[str]:
    """The C++ compiler's command: ``$CXX``, or the first of :data:`COMPILERS` that is installed.

    Raises:
        NativeError: there is none.
    """
    command = shlex.split(os.environ.get("CXX", ""))
    if command:
        return command
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    if found is None:
        raise NativeError("no C++ compiler is installed")
    return [found]


def flags() -> list[str]:
    """The compiler's options: :data:`FLAGS`, and those of the environment."""
    return [*FLAGS, *shlex.split(os.environ.get(EXTRA_FLAGS, ""))]


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "qconv" / "native"


def kernels_folder() -> Path:
    """The folder of the sources: inside the wheel, or at the checkout's top level in an editable install."""
    package = Path(__file__).parent
    packaged = package / "kernels"
    return packaged if packaged.is_dir() else package.parent / "kernels"


def _digest(sources: Path, name: str, compiler: Sequence[str]) -> str:
    digest = hashlib.sha256(" ".join(flags()).encode())
    digest.update(_run([*compiler, *flags(), "-dM", "-E", "-x", "c++", os.devnull]))
    try:
        for file in [sources / f"{name}.cpp", *sorted(sources.rglob("*.h"))]:
            digest.update(str(file.relative_to(sources)).encode() + b"\0" + file.read_bytes())
    except OSError as error:
        raise NativeError(f"its source cannot be read ({error})") from None
    return digest.hexdigest()[:20]


def _run(command: Sequence[str]) -> bytes:
    try:
        done = subprocess.run(command, capture_output=True, timeout=_PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(f"{command[0]} does not run ({error})") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").splitlines()
        first = next((line for line in said if "error" in line), said[0] if said else "no message")
        raise NativeError(f"{command[0]} fails with {first.strip()!r}")
    return done.stdout
