"""Plain Python values as JSON, for the pipe between the trusted check and the candidate's process.

Values of exact builtin types travel: None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict,
and fractions and decimals. Of any other object (a generator, a range, a match) what a check may ask for travels:
whether it is true, and the items that it gives. The reader builds every object itself and limits size, depth and count,
so whatever the other side writes, no method of it ever runs here. Nothing but the standard library is imported, since
the sandbox holds nothing else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from itertools import islice
from typing import TypeAlias, TypeVar


class Foreign:
    """Stands for an object that is no plain value: true or not, perhaps with items, equal to nothing but itself."""

    __slots__ = ("_items", "_true", "_whole")

    def __init__(self, true: bool, items: tuple[Literal, ...] | None, whole: bool) -> None:
        """With its items, None where it gives none, and whether these are all."""
        self._true, self._items, self._whole = true, items, whole

    def __bool__(self) -> bool:
        return self._true

    def __iter__(self) -> Iterator[Literal]:
        if self._items is None:
            raise TypeError("it gives no items")
        yield from self._items
        if not self._whole:
            raise ValueError("it does not end, or with an exception")


Literal: TypeAlias = (
    bool
    | int
    | float
    | complex
    | Fraction
    | Decimal
    | Foreign
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
_LONGEST_PART = 1 << 12
"""Bits of a fraction's parts, and digits and exponent of a decimal: what arithmetic with them can cost the reader."""
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
    An object of another type is asked for its items, so that a generator is used up.

    Raises:
        NotLiteral: it or something in it is too large, too deep, too many, or cannot tell whether it is true.
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
    if isinstance(value, complex):
        plain = complex.__pos__(value)
        return ["complex", repr(plain.real), repr(plain.imag)]
    if isinstance(value, Fraction):
        return ["fraction", f"{value.numerator:x}", f"{value.denominator:x}"]
    if isinstance(value, Decimal):
        return ["decimal", Decimal.__str__(value)]
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
    return _encode_foreign(value, depth, budget)


def _encode_foreign(value: object, depth: int, budget: _Budget) -> Json:
    """Whether it is true, its items (null where it gives none) and whether these are all."""
    try:
        true = bool(value)
    except Exception as error:  # the object's own method may raise what it likes
        raise NotLiteral(f"an object of type {type(value).__name__} that is neither true nor false") from error
    try:
        rest = iter(value)  # type: ignore[call-overload]  # whether it can be iterated is the question
    except Exception:  # likewise
        return ["foreign", true, None, True]
    items: list[Json] = []
    try:
        # One more than may travel, so that what has no end is seen to have none.
        items += [_encode(item, depth + 1, budget) for item in islice(rest, budget.nodes)]
        whole = next(rest, budget) is budget
    except MemoryError:
        raise
    except Exception:  # likewise: a check that wants the items will fail, one that asks for the truth need not
        return ["foreign", true, [], False]
    return ["foreign", true, items, whole]


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
        case ["complex", str(real), str(imaginary)]:
            return complex(_parsed(float, real), _parsed(float, imaginary))
        case ["fraction", str(numerator), str(denominator)]:
            return _fraction(_parsed(int, numerator, 16), _parsed(int, denominator, 16))
        case ["decimal", str(digits)]:
            return _decimal(digits)
        case ["foreign", bool(true), None, True]:
            return Foreign(true, None, True)
        case ["foreign", bool(true), list(items), bool(whole)]:
            return Foreign(true, tuple(_decode(item, depth + 1, budget) for item in items), whole)
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


Parsed = TypeVar("Parsed")


def _parsed(parse: Callable[..., Parsed], *arguments: object) -> Parsed:
    try:
        return parse(*arguments)
    except ValueError as error:
        raise NotLiteral(str(error)) from None


def _fraction(numerator: int, denominator: int) -> Fraction:
    if denominator == 0 or max(numerator.bit_length(), denominator.bit_length()) > _LONGEST_PART:
        raise NotLiteral("a fraction over zero, or of too many digits")
    return Fraction(numerator, denominator)


def _decimal(digits: str) -> Decimal:
    if len(digits) > _LONGEST_PART:
        raise NotLiteral("a decimal of too many digits")
    try:
        value = Decimal(digits)
    except InvalidOperation:
        raise NotLiteral("no decimal") from None
    if value.is_finite() and abs(value.adjusted()) > _LONGEST_PART:
        raise NotLiteral("a decimal of too large an exponent")
    return value


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
