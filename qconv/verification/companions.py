"""What lies beside the weights of a build and decides what a reader computes: config.json, tokenizer, template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qconv.artifacts.build import with_both_spellings
from qconv.artifacts.reported import with_reported_rope
from qconv.artifacts.source import Source
from qconv.boundary.printable import name_of
from qconv.checkpoint.reader import read_json
from qconv.checkpoint.tiktoken import RANKS_NAME
from qconv.checkpoint.writer import sha256_of
from qconv.errors import CheckpointError, QconvError
from qconv.verification.outcome import Verification

_NOT_COMPARED = ("quantization_config", "compression_config", "quantization", "transformers_version", "_name_or_path")
"""What a quantizer writes, and what says nothing about the model."""
_DECIDING = ("tokenizer.json", "tokenizer.model", RANKS_NAME, "chat_template.*", "vocab.*", "merges.txt")
"""Companions of which a difference changes what a model is asked; others are named and no fault of other tools'."""
_ADDED = (*_DECIDING, "generation_config.json")
_NAMED = 8


def check_companions(path: Path, is_ours: bool, source: Source, result: Verification) -> None:
    """The files beside a build's weights against the source's.

    Args:
        path: The build's folder.
        is_ours: Whether qconv made it, which copies every file as it is.
        source: The source.
        result: Gets what was found.
    """
    result.problems += config_problems(path, source)
    problems: list[str] = []
    notices: list[str] = []
    theirs = {file.name: file for file in source.companions()}
    for name, file in theirs.items():
        ours = path / name
        if ours.is_file() and _same(ours, file):
            continue
        what = "is not the source's" if ours.is_file() else "is missing; the source has it"
        decides = any(fnmatchcase(name, pattern) for pattern in _DECIDING)
        (problems if is_ours or (decides and ours.is_file()) else notices).append(f"{name_of(name)} {what}")
    for name in sorted(file.name for file in path.iterdir() if file.is_file()):
        if name not in theirs and any(fnmatchcase(name, pattern) for pattern in _ADDED):
            (problems if is_ours else notices).append(f"{name_of(name)} is there; the source has none")
    result.problems += problems
    result.notices += notices
    result.checked.append(f"config.json and {len(theirs)} files beside it against the source's")


def config_problems(path: Path, source: Source) -> Iterator[str]:
    """Keys of a build's config.json that make another model of it than the source's."""
    try:
        ours = read_json(path / "config.json")
        theirs = with_both_spellings(with_reported_rope(source.checkpoint.config, path))
    except QconvError as error:
        yield error.message
        return
    different = [key for key in sorted({*ours, *theirs} - {*_NOT_COMPARED}) if not _equal(ours, theirs, key)]
    if different:
        resolved = _resolved(ours), _resolved(theirs)
        different = [key for key in different if not _resolve_alike(key, ours, theirs, *resolved)]
    for key in different[:_NAMED]:
        yield f"config.json: {name_of(key)} is {_shown(ours, key)}; the source has {_shown(theirs, key)}"
    if len(different) > _NAMED:
        yield f"config.json: {len(different) - _NAMED} more keys are not the source's"


def _equal(ours: Mapping[str, Any], theirs: Mapping[str, Any], key: str) -> bool:
    """Whether both say the same; true and 1 are not the same, absent and null are."""
    one, other = ours.get(key), theirs.get(key)
    return type(one) is type(other) and one == other


def _resolved(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """A config as transformers reads it, with its defaults and in its own spelling; None if it does not."""
    from transformers import AutoConfig

    values = {key: value for key, value in config.items() if key not in _NOT_COMPARED}
    try:
        made = AutoConfig.for_model(**values)
        found: dict[str, Any] = json.loads(made.to_json_string(use_diff=False))
    except Exception:  # whatever transformers raises on a config that it cannot read
        return None
    return found


def _resolve_alike(
    key: str,
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    resolved: dict[str, Any] | None,
    expected: dict[str, Any] | None,
) -> bool:
    """Whether a key that is spelled differently means the same to transformers.

    A key that it does not know is one for other readers, or for code that comes with the model, and must be the same.
    """
    if resolved is None or expected is None:
        return False
    known = key in expected and key in resolved
    spelled_once = key in _RENAMED and (key not in ours or key not in theirs)
    renamed = spelled_once and all(resolved.get(new) == expected.get(new) for new in _RENAMED[key])
    return renamed or (known and type(resolved[key]) is type(expected[key]) and resolved[key] == expected[key])


_RENAMED = {
    "torch_dtype": ("dtype",),
    "num_experts": ("num_local_experts", "num_experts"),
    "num_local_experts": ("num_local_experts", "num_experts"),
    "rope_theta": ("rope_parameters",),
    "rope_scaling": ("rope_parameters",),
    "rope_parameters": ("rope_parameters",),
}
"""Keys that transformers renames, with what they become."""


def _shown(config: Mapping[str, Any], key: str) -> str:
    return name_of(json.dumps(config[key]), 60) if key in config else "none"


def _same(ours: Path, theirs: Path) -> bool:
    try:
        return ours.stat().st_size == theirs.stat().st_size and sha256_of(ours) == sha256_of(theirs)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}.", hint="Check the disk.") from error
