"""How engines match the entries of a build's lists of exceptions, each in its own way."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from qconv.errors import CheckpointError
from qconv.formats.base import EXPRESSION, LINEAR, matches


def exactly(module: str, entries: Iterable[str]) -> bool:
    """Whether an entry is the name itself, or a regular expression after ``re:`` that fits its beginning: vLLM."""
    names, expressions = _apart(tuple(entries))
    return module in names or any(_fits(module, entry) for entry in expressions)


@functools.lru_cache(maxsize=64)
def _apart(entries: tuple[str, ...]) -> tuple[frozenset[str], tuple[str, ...]]:
    """Names, and regular expressions."""
    expressions = tuple(entry for entry in entries if entry.startswith(EXPRESSION))
    return frozenset(entries).difference(expressions), expressions


def by_part(module: str, entries: Iterable[str]) -> bool:
    """Whether an entry is a part of the name anywhere: AutoAWQ, and SGLang for compressed-tensors."""
    return any(_fits(module, entry) if entry.startswith(EXPRESSION) else entry in module for entry in entries)


def within(module: str, entries: Iterable[str]) -> bool:
    """Whether an entry is the name or a module around it: transformers, for FP8."""
    return any(module == entry or module.startswith(f"{entry}.") for entry in entries)


def is_class(target: str) -> bool:
    """Whether a target of a config group is a class and no module."""
    return target == LINEAR or ("." not in target and not target.startswith(EXPRESSION) and target[:1].isupper())


def _fits(module: str, entry: str) -> bool:
    try:
        return matches(module, entry)
    except CheckpointError:  # a regular expression that is not read
        return False
