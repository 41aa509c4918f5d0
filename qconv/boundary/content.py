"""What a file is by its first bytes, whatever it is called.

Downloads go wrong in ways that leave a file of the right name: a git clone without git-lfs leaves pointers, an expired
token an HTML page. Files of one kind go by several names: a GGUF model may end in ``.GGUF`` or lie in a store of blobs
under its checksum.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

GGUF_MAGIC = b"GGUF"
HEAD_BYTES = 512
"""Enough to tell every kind apart; a git-lfs pointer is shorter as a whole."""

_NAMED_LIKE_MARKUP = (".html", ".htm", ".xml", ".svg")


@dataclass(frozen=True, slots=True)
class Instead:
    """What lies where something else was to lie.

    Attributes:
        what: What it is, with an article.
        remedy: How to get what it stands for, a sentence.
    """

    what: str
    remedy: str


_LFS = Instead("a git-lfs pointer, not the file that it stands for", "Fetch the file itself: git lfs pull.")
_ANNEX = Instead("a git-annex pointer, not the file that it stands for", "Fetch the file itself: git annex get.")
_MARKUP = Instead(
    "an HTML or XML page, such as servers answer with where access is refused",
    "Download the file again, logged in, and accept the model's terms if it has some.",
)
_ANSWER = Instead("a server's error message", "Check the address and the access token, and download the file again.")
_PICKLE = Instead("a pickled PyTorch file", "Convert it to safetensors first; qconv does not unpickle.")
_GZIP = Instead("compressed with gzip", "Decompress it.")


def instead_of_file(head: bytes) -> Instead | None:
    """What a download left in place of any file at all, by the file's first bytes; None if that cannot be told."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs.github.com/spec/"):
        return _LFS
    if text.startswith(b"/annex/objects/"):
        return _ANNEX
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<error", b"<head")):
        return _MARKUP
    if text.startswith((b"entry not found", b"access to model", b"invalid username or password", b"not found")):
        return _ANSWER
    return None


def instead_of_tensors(head: bytes) -> Instead | None:
    """The same for a file that should hold tensors: what else it is."""
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return _PICKLE
    if head.startswith(b"\x1f\x8b"):
        return _GZIP
    if head.startswith(GGUF_MAGIC):
        return Instead("a GGUF file", "Give its path by itself, as the model.")
    return instead_of_file(head)


def head_of(path: Path) -> bytes:
    """The first bytes of a regular file; none of anything else, or of a file that cannot be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return b""
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except (OSError, ValueError):
        return b""


def misplaced_files(folder: Path) -> dict[str, Instead]:
    """Of a folder's own files, by name, those that a failed download left in place of what they are called."""
    found = {}
    for path in sorted(folder.iterdir()):
        instead = None if path.suffix.lower() in _NAMED_LIKE_MARKUP else instead_of_file(head_of(path))
        # A chat template may begin with markup, and with no pointer.
        if instead is not None and (instead is not _MARKUP or path.suffix != ".jinja"):
            found[path.name] = instead
    return found


def is_gguf_file(path: Path) -> bool:
    """Whether a file is GGUF: by its magic, or, damaged or absent, by its name."""
    return path.suffix.lower() == ".gguf" or head_of(path).startswith(GGUF_MAGIC)


def gguf_files(folder: Path) -> list[Path]:
    """The files of a folder that are called GGUF, in small or capital letters, sorted."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() == ".gguf" and file.is_file())


FOLDED_SCALES = "folded-scales.safetensors"
"""The file of the scales that were folded into a GGUF model, beside it: a tensor for each producer."""


def is_gguf(path: Path) -> bool:
    """Whether a model on disk is GGUF: such a file, or a folder of such files without weights in safetensors.

    A config.json may lie beside them, as many repositories have it, and :data:`FOLDED_SCALES`, which are no weights.
    """
    if not path.is_dir():
        return is_gguf_file(path)
    weights = any(file.name != FOLDED_SCALES for file in path.glob("*.safetensors"))
    return bool(gguf_files(path)) and not weights and not _has_index(path)


def _has_index(folder: Path) -> bool:
    return any(folder.glob("*.safetensors.index.json"))
