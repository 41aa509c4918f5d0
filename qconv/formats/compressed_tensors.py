"""What compressed-tensors' formats share: the words of their ``quantization_config`` and its list of exceptions."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from qconv.errors import CheckpointError
from qconv.patterns import Pattern, PatternError

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
    """Whether a list of exceptions holds a module: exact match, or a regular expression after ``re:``.

    Raises:
        CheckpointError: an expression of a kind that is not read.
    """
    return any(
        _pattern(entry.removeprefix("re:")).match(module) if entry.startswith("re:") else entry == module
        for entry in skipped
    )


@functools.lru_cache(maxsize=1024)
def _pattern(text: str) -> Pattern:
    try:
        return Pattern.parse(text)
    except PatternError as error:
        raise CheckpointError(
            f"config.json: quantization_config.ignore: {text!r} is no regular expression that is read: {error}.",
            hint="Write it with groups, sets, repeats and look-ahead alone.",
        ) from error
