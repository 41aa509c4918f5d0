"""What is evaluated, by the hash of its content: a checkpoint, a build, GGUF files, or an endpoint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import JsonValue

from qconv.build import REPORT_NAME
from qconv.chat.files import ADDITIONAL_FOLDER
from qconv.checkpoint.hub import folder_name, resolve_model
from qconv.checkpoint.reader import Checkpoint, read_json
from qconv.checkpoint.writer import sha256_of
from qconv.errors import CheckpointError, UsageError
from qconv.evaluation.record import Artifact
from qconv.formats import detect
from qconv.gguf.recipe import FORMAT as GGUF_FORMAT
from qconv.gguf.recipe import parse_gguf_recipe
from qconv.recipe import parse_recipe
from qconv.source import Source
from qconv.verification.build import verify
from qconv.verification.checksums import CHECKSUMS_NAME, check_sums
from qconv.verification.gguf import is_gguf, verify_gguf
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
    return Path(name) if name.endswith(".gguf") and os.path.isfile(name) else resolve_model(name)


def identify(path: Path) -> Artifact:
    """What lies at a path. Reads every byte of the weights, up to :data:`WHOLE_BYTES`.

    Raises:
        CheckpointError: neither a checkpoint nor GGUF, or unreadable.
    """
    if is_gguf(path):
        return _gguf(path)
    checkpoint = Checkpoint.open(path)
    size = sum(file.stat().st_size for file in checkpoint.files)
    whole = size <= WHOLE_BYTES
    weights = _digest([*checkpoint.files, path / "config.json"]) if whole else checkpoint.fingerprint()
    report = _report(path)
    kind: Literal["model", "build"] = "model" if detect(checkpoint.config) is None else "build"
    return Artifact(
        name=folder_name(path),
        path=str(path),
        kind=kind,
        sha256=weights,
        tokenizer_sha256=_digest(_matching(path, (*_TOKENIZER_PATTERNS, *_TEMPLATE_PATTERNS))),
        size=size,
        **_told(report),
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
    from qconv.gguf.reader import GgufModel

    made = GgufModel.open(path)
    folder = path if path.is_dir() else path.parent
    numel = sum(entry.numel for entry in made.entries.values())
    nbytes = sum(entry.nbytes for entry in made.entries.values())
    told = _told(_report(folder)) | {"bits_per_weight": round(8 * nbytes / numel, 4) if numel else None}
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


def _report(folder: Path) -> dict[str, Any]:
    """The build's own report; empty if there is none that can be read."""
    if not (folder / REPORT_NAME).exists():
        return {}
    return read_json(folder / REPORT_NAME)


def _told(report: dict[str, Any]) -> dict[str, Any]:
    """What a report tells, as fields of an artifact."""
    if not report:
        return {}
    recipe = report.get("recipe")
    method = recipe.get("method") if isinstance(recipe, dict) else None
    return {
        "format": report.get("format"),
        "method": "+".join(method) if isinstance(method, list) else method,
        "recipe_sha256": _recipe_digest(recipe) if isinstance(recipe, dict) else None,
        "bits_per_weight": report.get("bits_per_weight"),
        "quantized_bits_per_weight": report.get("quantized_bits_per_weight"),
        "report": _fallbacks(report),
    }


def _recipe_digest(recipe: dict[str, Any]) -> str:
    return parse_gguf_recipe(recipe).digest() if recipe.get("format") == GGUF_FORMAT else parse_recipe(recipe).digest()


def _fallbacks(report: dict[str, Any]) -> dict[str, JsonValue]:
    """Coverage of the experts, and what was left to plain rounding."""
    layers = report.get("layers") or []
    searches = [search for layer in layers for search in layer.get("searches", {}).values()]
    experts = [expert for layer in layers for expert in layer.get("experts", [])]
    linears = [one for layer in layers for one in layer.get("compensations", {}).values()]
    return {
        "coverage": report.get("coverage"),
        "degenerate": len(report.get("degenerate") or []),
        "searches": len(searches),
        "searches_kept_rtn": sum(bool(search["kept_rtn"]) for search in searches),
        "mlps": len(experts),
        "mlps_worse_than_rtn": sum(expert["loss"] > expert["rtn_loss"] for expert in experts),
        "rows_kept_rtn": sum(one.get("rows_kept_rtn", 0) for one in linears),
    }
