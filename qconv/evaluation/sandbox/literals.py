"""Plain Python values as JSON, for the pipe between the trusted check and the candidate's process.

Only exact builtin types travel: None, bool, int, float, str, bytes, list, tuple, set, frozenset, dict. The reader
builds every object itself and limits size, depth and count, so whatever the other side writes, no method of it ever
runs here. Nothing but the standard library is imported, since the sandbox holds nothing else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import TypeAlias

Literal: TypeAlias = (
    bool
    | int
    | float
    | str
    | bytes
    | list["Literal"]
    | tuple["Literal", ...]
    | set["Literal"]
    | frozenset["Literal"]
    | dict["Literal", "Literal"]
    | None
)
Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None

LARGEST_MESSAGE = 1 << 20
"""Bytes of one message, arguments or result; HumanEval's largest has under 10 KB."""
DEEPEST = 32
"""Containers within containers."""
MOST_NODES = 10_000
"""Values within a value: it also bounds what colliding hashes in a set or dict can cost the reader."""
_JSON_INTEGER = 1 << 53
_SEQUENCES = (list, tuple, set, frozenset)


class NotLiteral(ValueError):
    """A value, or what claims to encode one, that may not travel."""


class _Budget:
    def __init__(self) -> None:
        self.nodes = MOST_NODES

    def spend(self, depth: int) -> None:
        self.nodes -= 1
        if self.nodes < 0:
            raise NotLiteral(f"more than {MOST_NODES:,} values")
        if depth > DEEPEST:
            raise NotLiteral(f"nested deeper than {DEEPEST}")


def encode(value: object) -> Json:
    """The JSON form of a value: itself where JSON has the type, else a list of a tag and a payload.

    An instance of a subclass travels as the builtin that it holds (a Counter as its dict), never by methods of its own.

    Raises:
        NotLiteral: it or something in it is of another type, too deep or too many.
    """
    return _encode(value, 0, _Budget())


def _encode(value: object, depth: int, budget: _Budget) -> Json:
    budget.spend(depth)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        number = int.__index__(value)
        return number if -_JSON_INTEGER < number < _JSON_INTEGER else ["int", f"{number:x}"]
    if isinstance(value, float):
        real = float.__float__(value)
        return real if math.isfinite(real) else ["float", repr(real)]
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bytes):
        return ["bytes", bytes.hex(value)]
    if isinstance(value, dict):
        pairs: list[Json] = []
        for key, item in list(dict.items(value)):
            pairs.append([_encode(key, depth + 1, budget), _encode(item, depth + 1, budget)])
        return ["dict", pairs]
    for base in _SEQUENCES:
        if isinstance(value, base):
            items = base.__iter__(value)  # type: ignore[arg-type]  # the loop's types are not followed
            return [base.__name__, [_encode(item, depth + 1, budget) for item in items]]
    raise NotLiteral(f"an object of type {type(value).__name__}")


def decode(encoded: object) -> Literal:
    """The value of an encoded form, made of exact builtin types.

    Raises:
        NotLiteral: the form is not one that ``encode`` makes.
    """
    return _decode(encoded, 0, _Budget())


def _decode(encoded: object, depth: int, budget: _Budget) -> Literal:
    budget.spend(depth)
    if encoded is None or isinstance(encoded, bool | int | str):
        return encoded
    if isinstance(encoded, float):
        if not math.isfinite(encoded):
            raise NotLiteral("a bare infinity or NaN")
        return encoded
    match encoded:
        case ["int", str(digits)]:
            return _parsed(int, digits, 16)
        case ["float", "inf" | "-inf" | "nan" as name]:
            return float(name)
        case ["bytes", str(digits)]:
            return _parsed(bytes.fromhex, digits)
        case ["list", list(items)]:
            return [_decode(item, depth + 1, budget) for item in items]
        case ["tuple", list(items)]:
            return tuple(_decode(item, depth + 1, budget) for item in items)
        case ["set", list(items)]:
            return {_hashable(_decode(item, depth + 1, budget)) for item in items}
        case ["frozenset", list(items)]:
            return frozenset(_hashable(_decode(item, depth + 1, budget)) for item in items)
        case ["dict", list(pairs)]:
            result: dict[Literal, Literal] = {}
            for pair in pairs:
                if not (isinstance(pair, list) and len(pair) == 2):
                    raise NotLiteral("a dict's entry that is not a pair")
                result[_hashable(_decode(pair[0], depth + 1, budget))] = _decode(pair[1], depth + 1, budget)
            return result
    raise NotLiteral("an unknown form")


def _parsed(parse: Callable[..., Literal], *arguments: object) -> Literal:
    try:
        return parse(*arguments)
    except ValueError as error:
        raise NotLiteral(str(error)) from None


def _hashable(value: Literal) -> Literal:
    try:
        hash(value)
    except TypeError:
        raise NotLiteral("a list, set or dict as a key") from None
    return value


def write_message(fields: dict[str, Json]) -> bytes:
    """One line of ASCII.

    Raises:
        NotLiteral: it is larger than the reader takes.
    """
    line = json.dumps(fields, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"
    if len(line) > LARGEST_MESSAGE:
        raise NotLiteral(f"larger than {LARGEST_MESSAGE:,} bytes")
    return line


def read_message(line: bytes) -> dict[str, object]:
    """The fields of one line.

    Raises:
        NotLiteral: it is not an object in JSON.
    """
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise NotLiteral(f"not JSON ({type(error).__name__})") from None
    if not isinstance(fields, dict):
        raise NotLiteral("not an object")
    return fields
