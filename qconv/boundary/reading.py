"""The one place where JSON and YAML from outside become values.

Whatever a file holds, reading it either gives plain values or raises one error of ours that names the file and says
what is wrong with it. Bounds are checked before anything is built: a file's size, how deep values nest, and how many
values a YAML document has once its aliases are expanded, since a few hundred bytes can stand for billions of them.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from qconv.boundary.content import HEAD_BYTES, instead_of_file
from qconv.boundary.printable import printable
from qconv.errors import QconvError

MAX_JSON_BYTES = 128 * 2**20
"""The largest JSON file read; the index of a checkpoint of a million tensors takes 100 MB."""
MAX_JSON_VALUES = 5_000_000
"""Keys and values of a JSON text; a tokenizer of 250,000 words and as many merges has a million. Each takes memory many
times its two or three characters."""
MAX_YAML_BYTES = 2**20
"""The largest YAML file read: recipes, suites, gates and nightly configurations are a few kB."""
MAX_YAML_VALUES = 100_000
"""Values of a YAML document, each counted as often as aliases repeat it."""
MAX_DIGITS = 100
"""Of a whole number in JSON: models write 10 ** 30 for no limit, and a float still holds what this allows."""
MAX_DEPTH = 100
"""Levels of values in values. Python's own limit is ten times that, and what walks the values needs some of it."""

_RAISED = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What PyYAML raises: its own errors, and whatever int(), float(), date() or a dict say of a value."""


class Unreadable(Exception):
    """What is wrong with a text, in half a sentence."""


def read_json(path: Path, error: type[QconvError], *, hint: str | None = None) -> Any:
    """The value in a JSON file.

    Args:
        path: The file.
        error: What to raise.
        hint: What to do about it.

    Raises:
        QconvError: ``error``: missing, unreadable, too large, no UTF-8, no JSON.
    """
    return parse_json(_content(path, MAX_JSON_BYTES, error, hint), str(path), error, hint=hint)


def parse_json(text: bytes | str, where: str, error: type[QconvError], *, hint: str | None = None) -> Any:
    """The value of a JSON text.

    Args:
        text: The text, or its UTF-8 bytes.
        where: What the text is, for the message: a file, a line of it, an answer.
        error: What to raise.
        hint: What to do about it.

    Raises:
        QconvError: ``error``: no UTF-8, no JSON, more than :data:`MAX_JSON_VALUES`, nested too deep, or with half of a
            surrogate pair in a string; or what a failed download left instead, by name.
    """
    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        if sum(map(decoded.count, ",:[{")) > MAX_JSON_VALUES:
            raise Unreadable(f"it holds more than {MAX_JSON_VALUES:,} values")
        value = json.loads(decoded, parse_int=_whole_number)
        _require_shallow(value)
        if "\\u" in decoded:
            _require_unicode(value)
    except (ValueError, RecursionError, Unreadable) as problem:
        instead = instead_of_file(text[:HEAD_BYTES]) if isinstance(text, bytes) else None
        if instead is not None:
            raise error(
                f"{printable(where)}: cannot be read as JSON: it is {instead.what}.", hint=instead.remedy
            ) from problem
        raise error(f"{printable(where)}: cannot be read as JSON: {_reason(problem)}.", hint=hint) from problem
    return value


def read_yaml(path: Path, error: type[QconvError], *, hint: str | None = None) -> Any:
    """The value in a YAML file.

    Raises:
        QconvError: ``error``: missing, unreadable, too large, no UTF-8, no YAML, or as :func:`parse_yaml`.
    """
    return parse_yaml(_content(path, MAX_YAML_BYTES, error, hint), str(path), error, hint=hint)


def parse_yaml(text: bytes | str, where: str, error: type[QconvError], *, hint: str | None = None) -> Any:
    """The value of a YAML text with one document of plain values.

    Raises:
        QconvError: ``error``: no UTF-8, no YAML, a value that its tag does not fit, nested too deep, or more than
            :data:`MAX_YAML_VALUES` values with its aliases expanded.
    """
    try:
        loader = _Loader(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, 0, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except (*_RAISED, Unreadable) as problem:
        raise error(f"{printable(where)}: cannot be read as YAML: {_reason(problem)}.", hint=hint) from problem


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, for which a key that stands twice in a mapping is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise Unreadable(f"line {key.start_mark.line + 1}: the key {printable(key.value)!r} stands there twice")
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _content(path: Path, most: int, error: type[QconvError], hint: str | None) -> bytes:
    """A regular file's bytes."""
    name = printable(str(path))
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise error(f"{name}: is no file.", hint=hint)
        if found.st_size > most:
            raise error(f"{name}: {found.st_size:,} bytes are more than the {most:,} that are read.", hint=hint)
        return path.read_bytes()
    except OSError as problem:
        raise error(f"{name}: {problem.strerror or problem}.", hint=hint) from problem
    except ValueError as problem:  # a path with a zero byte
        raise error(f"{name}: {problem}.", hint=hint) from problem


def _reason(problem: Exception) -> str:
    """One line of what a library said."""
    if isinstance(problem, RecursionError):
        return "it is nested too deep"
    if isinstance(problem, yaml.MarkedYAMLError) and problem.problem_mark is not None:
        said = problem.problem or problem.context or "it is malformed"
        return printable(f"line {problem.problem_mark.line + 1}: {said}")
    if isinstance(problem, (KeyError, AttributeError, TypeError, IndexError)):
        return f"a value does not fit its type ({printable(str(problem))})"
    return printable(" ".join(str(problem).split()))[:300].rstrip(".")


def _whole_number(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise Unreadable(f"a number has {len(text):,} digits")
    return int(text)


def _require_shallow(value: Any) -> None:
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise Unreadable(f"values are nested more than {MAX_DEPTH} deep")
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner += [item for item in one.values() if isinstance(item, (dict, list))]
            elif isinstance(one, list):
                inner += [item for item in one if isinstance(item, (dict, list))]
        level, depth = inner, depth + 1


def _require_unicode(value: Any) -> None:
    """Every string must have a UTF-8 form; the escape ``\\ud800`` alone has none."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as problem:
        raise Unreadable("a string holds half of a surrogate pair") from problem


def _count(node: yaml.Node, depth: int, known: dict[int, int]) -> int:
    """Values below a node, aliases expanded; 0 in ``known`` marks those that are being counted."""
    if depth > MAX_DEPTH:
        raise Unreadable(f"values are nested more than {MAX_DEPTH} deep")
    if known.get(id(node)) == 0:
        raise Unreadable(f"line {node.start_mark.line + 1}: a value contains itself")
    if id(node) not in known:
        known[id(node)] = 0
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif isinstance(node, yaml.MappingNode):
            inner = [one for pair in node.value for one in pair]
        found = 1 + sum(_count(one, depth + 1, known) for one in inner)
        if found > MAX_YAML_VALUES:
            raise Unreadable(f"with its aliases it stands for more than {MAX_YAML_VALUES:,} values")
        known[id(node)] = found
    return known[id(node)]
