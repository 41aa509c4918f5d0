"""A build's checksum file: written, read with suspicion, and held against what lies in the folder."""

from __future__ import annotations

import stat
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path

from qconv.boundary.content import misplaced_files
from qconv.boundary.printable import name_of
from qconv.checkpoint.hub import outside_of
from qconv.checkpoint.writer import sha256_of
from qconv.errors import CheckpointError
from qconv.folders.journal import WORK_FOLDER
from qconv.folders.state import CHECKSUMS_NAME
from qconv.verification.outcome import Progress, Verification

MAX_CHECKSUM_BYTES = 16 * 2**20
"""A line takes some 110 bytes; the largest builds have a few hundred files."""

LOADED = (
    *("*.safetensors", "*.safetensors.index.json", "*.gguf", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt"),
    *("*.pkl", "*.h5", "*.msgpack", "*.onnx", "*.py", "*.so", "*.jinja", "*.json", "*.model", "*.tiktoken"),
    *("tokenizer*", "vocab.*", "merges.txt", "chat_template*"),
)
"""What loaders read where they find it: weights, configurations, tokenizers, templates, code. In small letters."""
_NAMED_ONE_BY_ONE = 10
"""Files that are no part of a build and that nobody reads, before they are only counted."""


def parse_checksums(text: str) -> dict[str, str]:
    """File names and sha256 from a checksum file in sha256sum's format.

    Raises:
        ValueError: a line is none of sha256sum's, or names a file twice.
    """
    if not text.endswith("\n") or text == "\n":
        raise ValueError("its last line is cut off" if text else "it is empty")
    sums: dict[str, str] = {}
    for line in text[:-1].split("\n"):
        digest, mode, name = line[:64], line[64:66], line[66:].removeprefix("./")
        if len(digest) != 64 or mode not in ("  ", " *") or not name or not set(digest) <= set("0123456789abcdef"):
            raise ValueError(f"malformed line {name_of(line, 100)!r}")
        if name in sums:
            raise ValueError(f"{name_of(name)} is listed twice")
        sums[name] = digest
    return sums


def render_checksums(sums: dict[str, str]) -> str:
    """sha256sum's format, sorted by file name."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def build_files(path: Path) -> list[str]:
    """Every file of a build but the checksum file and the work folder, relative, sorted."""
    files = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
    return sorted(str(file) for file in files if file.parts[0] != WORK_FOLDER and str(file) != CHECKSUMS_NAME)


def check_sums(path: Path, result: Verification, progress: Progress | None) -> None:
    """Every file of a folder against the checksums in it, if there are any, and none that loaders read besides."""
    for name, instead in misplaced_files(path).items():
        result.problems.append(f"{name_of(name)} is {instead.what}")
    sums = _read(path, result)
    if sums is None:
        return
    _compare(path, sums, sums.keys(), result, progress)
    others = [name for name in build_files(path) if name not in sums]
    loaded = [name for name in others if _is_loaded(name)]
    result.problems += [f"{name_of(name)}: not listed in {CHECKSUMS_NAME}" for name in loaded]
    rest = sorted({*others} - {*loaded})
    result.notices += [f"{name_of(name)}: not part of the build" for name in rest[:_NAMED_ONE_BY_ONE]]
    if len(rest) > _NAMED_ONE_BY_ONE:
        result.notices.append(f"{len(rest) - _NAMED_ONE_BY_ONE} more files are not part of the build")
    result.checked.append(f"sha256 of {len(sums)} files")


def check_sums_of(files: Collection[Path], result: Verification, progress: Progress | None) -> None:
    """Files of one folder against the checksums in it, if there are any; whatever else lies there is not looked at."""
    folder = next(iter(files)).parent
    sums = _read(folder, result)
    if sums is None:
        return
    names = [file.name for file in files]
    missing = [name for name in names if name not in sums]
    result.problems += [f"{name_of(name)}: not listed in {CHECKSUMS_NAME}" for name in missing]
    listed = [name for name in names if name in sums]
    _compare(folder, sums, listed, result, progress)
    result.checked.append(f"sha256 of {len(listed)} files")


def _read(folder: Path, result: Verification) -> dict[str, str] | None:
    """The checksums of a folder; None where there are none to compare with, which is said."""
    file = folder / CHECKSUMS_NAME
    if not file.exists() and not file.is_symlink():
        result.notices.append(f"no {CHECKSUMS_NAME}: flipped bits that leave the structure whole cannot be found")
        return None
    try:
        size = _require_inside(folder, CHECKSUMS_NAME)
        if size > MAX_CHECKSUM_BYTES:
            raise ValueError(f"{size:,} bytes are more than the {MAX_CHECKSUM_BYTES:,} that are read")
        return parse_checksums(file.read_bytes().decode())
    except (OSError, ValueError, RuntimeError, CheckpointError) as error:
        result.problems.append(f"{CHECKSUMS_NAME}: {error}")
        return None


def _compare(
    folder: Path, sums: dict[str, str], names: Collection[str], result: Verification, progress: Progress | None
) -> None:
    for done, name in enumerate(names):
        if progress is not None:
            progress("checksums", done, len(names))
        try:
            _require_inside(folder, name)
            if sha256_of(folder / name) != sums[name]:
                result.problems.append(f"{name_of(name)}: its sha256 is not the one in {CHECKSUMS_NAME}")
        except OSError as error:
            result.problems.append(f"{name_of(name)}: {error.strerror}")
        except (ValueError, RuntimeError, CheckpointError) as error:
            result.problems.append(f"{name_of(name)}: {error}")


def _require_inside(folder: Path, name: str) -> int:
    """The size of a regular file that lies in a folder, or where a Hub's cache keeps what the folder shows.

    Raises:
        CheckpointError: it lies elsewhere, by its name or because it is a link, or is no file.
        OSError, ValueError, RuntimeError: it cannot be looked at.
    """
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "\\" in name:
        raise CheckpointError("the name leads out of the folder; it was not read.")
    if outside_of(folder, folder / name) is not None:
        raise CheckpointError("a link that leads out of the folder; it was not read.")
    found = (folder / name).stat()
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError("no regular file; it was not read.")
    return found.st_size


def _is_loaded(name: str) -> bool:
    leaf = name.rpartition("/")[2].lower()
    return any(fnmatchcase(leaf, pattern) for pattern in LOADED)
