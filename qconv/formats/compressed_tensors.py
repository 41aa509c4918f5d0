"""What compressed-tensors' formats share: the words of their ``quantization_config`` and its list of exceptions."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from qconv.boundary.patterns import Pattern, PatternError
from qconv.boundary.printable import name_of
from qconv.errors import CheckpointError
from qconv.formats.base import skip_list

_TARGET = "target:"
"""Before a config group's target in a list of exceptions, where no module's name has a colon."""
VERSION = "0.20.0"
"""The release whose layouts these are; written to config.json as readers expect."""


def quantization_config(
    kind: str, weights: dict[str, Any], activations: dict[str, Any] | None, skipped: Sequence[str]
) -> dict[str, Any]:
    """One config group that targets every Linear, and the list of exceptions.

    Args:
        kind: The compression format, ``pack-quantized`` ...
        weights: How weights are quantized.
        activations: How a linear's inputs are, None for not at all.
        skipped: The linears left alone, by name.
    """
    group = {
        "targets": ["Linear"],
        "format": kind,
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": list(skipped),
        "config_groups": {"group_0": group},
        "version": VERSION,
        "sparsity_config": {},
        "transform_config": {},
    }


def is_of_kind(section: dict[str, Any], kind: str) -> bool:
    """Whether a ``quantization_config`` is compressed-tensors' of that compression format."""
    return section.get("quant_method") == "compressed-tensors" and section.get("format") == kind


def is_skipped(module: str, skipped: Sequence[str]) -> bool:
    """Whether a list of exceptions, or what a config group does not target, holds a module."""
    targets = [entry.removeprefix(_TARGET) for entry in skipped if entry.startswith(_TARGET)]
    if targets and not any(_matches(module, target) for target in targets):
        return True
    return any(_matches(module, entry) for entry in skipped)


def _matches(module: str, entry: str) -> bool:
    """An exact match, or a regular expression after ``re:``."""
    return _pattern(entry.removeprefix("re:")).match(module) if entry.startswith("re:") else entry == module


@functools.lru_cache(maxsize=1024)
def _pattern(text: str) -> Pattern:
    try:
        return Pattern.parse(text)
    except PatternError as error:
        raise CheckpointError(
            f"config.json: quantization_config: {name_of(text)!r} is no regular expression that is read: {error}.",
            hint="Write it with groups, sets, repeats and look-ahead alone.",
        ) from error


def exceptions(section: dict[str, Any]) -> list[str]:
    """The list of exceptions of a ``quantization_config`` with one config group, and which modules that group targets.

    Targets are names of classes, of which the linears' is the only one that counts, names of modules, or regular
    expressions after ``re:``. They stand in the list as :func:`is_skipped` wants them.

    Raises:
        CheckpointError: not a list of names, or an expression that is none.
    """
    listed = skip_list(section, "ignore")
    targets = next(iter(section["config_groups"].values())).get("targets")
    if not isinstance(targets, list) or not all(isinstance(one, str) for one in targets) or "Linear" in targets:
        targets = []
    for entry in (*listed, *targets):
        if entry.startswith("re:"):
            _pattern(entry.removeprefix("re:"))
    return [*listed, *(f"{_TARGET}{target}" for target in targets)]
