"""A build's checksum file: written, read with suspicion, and held against what lies in the folder."""

from __future__ import annotations

from pathlib import Path

from qconv.checkpoint.writer import sha256_of
from qconv.manifest import WORK_FOLDER
from qconv.verification.outcome import Progress, Verification

CHECKSUMS_NAME = "SHA256SUMS"


def parse_checksums(text: str) -> dict[str, str]:
    """File names and sha256 from a checksum file in sha256sum's format.

    Raises:
        ValueError: not exactly what :func:`render_checksums` writes.
    """
    sums = {}
    for line in text.splitlines():
        digest, separator, name = line.partition("  ")
        if not separator or not name:
            raise ValueError(f"malformed line {line!r}")
        sums[name] = digest
    if render_checksums(sums) != text or any(len(value) != 64 for value in sums.values()):
        raise ValueError("not in canonical form")
    return sums


def render_checksums(sums: dict[str, str]) -> str:
    """sha256sum's format, sorted by file name."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def build_files(path: Path) -> list[str]:
    """Every file of a build but the checksum file and the work folder, relative, sorted."""
    files = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
    return sorted(str(file) for file in files if file.parts[0] != WORK_FOLDER and str(file) != CHECKSUMS_NAME)


def check_sums(path: Path, result: Verification, progress: Progress | None) -> None:
    """Every file against the checksums of the build, if it has them."""
    file = path / CHECKSUMS_NAME
    if not file.exists():
        result.notices.append(f"no {CHECKSUMS_NAME}: flipped bits that leave the structure whole cannot be found")
        return
    try:
        sums = parse_checksums(file.read_text())
    except (OSError, ValueError) as error:
        result.problems.append(f"{CHECKSUMS_NAME}: {error}")
        return
    for done, (name, expected) in enumerate(sums.items()):
        if progress is not None:
            progress("checksums", done, len(sums))
        try:
            if sha256_of(path / name) != expected:
                result.problems.append(f"{name}: its sha256 is not the one in {CHECKSUMS_NAME}")
        except OSError as error:
            result.problems.append(f"{name}: {error.strerror}")
    for name in build_files(path):
        if name in sums:
            continue
        if name.endswith(".safetensors"):
            result.problems.append(f"{name}: not listed in {CHECKSUMS_NAME}")
        else:
            result.notices.append(f"{name}: not part of the build")
    result.checked.append(f"sha256 of {len(sums)} files")
