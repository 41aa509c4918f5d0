"""What is evaluated, by the hash of its content: a checkpoint, a build, GGUF files, or an endpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from qconv.artifacts.layout import layout_of
from qconv.artifacts.source import Source
from qconv.boundary.content import is_gguf
from qconv.chat.files import ADDITIONAL_FOLDER
from qconv.checkpoint.hub import folder_name, resolve_build
from qconv.checkpoint.reader import Checkpoint
from qconv.checkpoint.writer import sha256_of
from qconv.errors import CheckpointError, UsageError
from qconv.evaluation.build_report import read_report
from qconv.evaluation.record import Artifact
from qconv.folders.state import CHECKSUMS_NAME, require_finished
from qconv.verification.build import verify
from qconv.verification.checksums import check_sums
from qconv.verification.gguf import verify_gguf
from qconv.verification.outcome import Progress, Verification

WHOLE_BYTES = 10**11
"""A larger checkpoint than this is known by its headers and samples of its shards: hashing 960 GB takes hours."""
_TOKENIZER_PATTERNS = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
_TEMPLATE_PATTERNS = ("chat_template.*", f"{ADDITIONAL_FOLDER}/*.jinja")


def locate(name: str) -> Path:
    """The folder or GGUF file that a name means; a Hub id is downloaded.

    Raises:
        UsageError: there is none.
    """
    return resolve_build(name)


def identify(path: Path) -> Artifact:
    """What lies at a path. Reads every byte of the weights, up to :data:`WHOLE_BYTES`.

    Raises:
        CheckpointError: neither a checkpoint nor GGUF, unreadable, or an unfinished build.
    """
    require_finished(path if path.is_dir() else path.parent)
    if is_gguf(path):
        return _gguf(path)
    checkpoint = Checkpoint.open(path)
    size = sum(file.stat().st_size for file in checkpoint.files)
    whole = size <= WHOLE_BYTES
    weights = _digest([*checkpoint.files, path / "config.json"]) if whole else checkpoint.fingerprint()
    kind: Literal["model", "build"] = "model" if layout_of(path, checkpoint.config).section is None else "build"
    return Artifact(
        name=folder_name(path),
        path=str(path),
        kind=kind,
        sha256=weights,
        tokenizer_sha256=_digest(_matching(path, (*_TOKENIZER_PATTERNS, *_TEMPLATE_PATTERNS))),
        size=size,
        **_told(path),
    )


def endpoint(address: str, model: str) -> Artifact:
    """A model that is known only by where it is served."""
    text = json.dumps([address, model])
    return Artifact(name=model, path=address, kind="endpoint", sha256=hashlib.sha256(text.encode()).hexdigest())


def check_integrity(artifact: Artifact, progress: Progress) -> Verification:
    """``qconv verify`` of what is evaluated; an unquantized checkpoint must be whole and fit its checksums, if any.

    Raises:
        UsageError: an endpoint, which cannot be checked.
    """
    path = Path(artifact.path)
    if artifact.kind == "gguf":
        return verify_gguf(path, None, progress)
    if artifact.kind == "build":
        return verify(path, None, progress)
    if artifact.kind == "endpoint":
        raise UsageError(f"{artifact.path}: an endpoint's files cannot be checked.")
    result = Verification()
    if (path / CHECKSUMS_NAME).exists():
        check_sums(path, result, progress)
    try:
        Source.open(path)
        result.checked.append("every tensor of the architecture once, of its shape")
    except CheckpointError as error:
        result.problems.append(error.message)
    return result


def _gguf(path: Path) -> Artifact:
    from qconv.formats.gguf.reader import GgufModel

    made = GgufModel.open(path)
    folder = path if path.is_dir() else path.parent
    numel = sum(entry.numel for entry in made.entries.values())
    nbytes = sum(entry.nbytes for entry in made.entries.values())
    told = _told(folder) | {"bits_per_weight": round(8 * nbytes / numel, 4) if numel else None}
    return Artifact(
        name=folder_name(path),
        path=str(path),
        kind="gguf",
        sha256=_digest(made.files),
        tokenizer_sha256=None,
        size=sum(file.stat().st_size for file in made.files),
        **told,
    )


def _digest(files: Iterable[Path]) -> str:
    """sha256 over the names and contents of files, hexadecimal."""
    digest = hashlib.sha256()
    try:
        for file in sorted(files):
            digest.update(f"{sha256_of(file)}  {file.name}\n".encode())
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}.") from error
    return digest.hexdigest()


def _matching(path: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()})


def _told(folder: Path) -> dict[str, Any]:
    """What the build's own report tells, as fields of an artifact; nothing where there is none."""
    report = read_report(folder)
    if report is None:
        return {}
    return {
        "format": report.format,
        "method": report.method,
        "recipe_sha256": report.recipe_digest(),
        "bits_per_weight": report.bits_per_weight,
        "quantized_bits_per_weight": report.quantized_bits_per_weight,
        "report": report.fallbacks(),
    }
