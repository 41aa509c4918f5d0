"""What travels arrives as the same plain value; what is not plain, too large or malformed does not arrive."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qconv.evaluation.sandbox.literals import (
    DEEPEST,
    LARGEST_MESSAGE,
    MOST_NODES,
    Literal,
    NotLiteral,
    decode,
    encode,
    read_message,
    write_message,
)

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.just(10**400)
)
KEYS = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3), max_leaves=5
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.sets(KEYS, max_size=4)
        | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=20,
)


def types(value: object) -> object:
    """The types of a value and of all in it: 1 == True == 1.0."""
    if isinstance(value, list | tuple):
        return type(value), [types(item) for item in value]
    if isinstance(value, dict):
        return type(value), [(types(key), types(item)) for key, item in value.items()]
    return type(value), None


def sent(value: object) -> Literal:
    """Over the wire and back."""
    return decode(read_message(write_message({"value": encode(value)}))["value"])


@given(VALUES)
def test_plain_values_arrive_unchanged(value: object) -> None:
    assert sent(value) == value
    assert types(sent(value)) == types(value)


def test_not_a_number_and_signed_zero_arrive() -> None:
    assert math.isnan(sent(float("nan")))  # type: ignore[arg-type]  # a float
    assert str(sent(-0.0)) == "-0.0"


def test_a_lone_surrogate_arrives() -> None:
    assert sent("\ud800\n\x00") == "\ud800\n\x00"


class Point(NamedTuple):
    x: int
    y: int


class Shouting(str):
    def __str__(self) -> str:
        return "forged"


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Counter("aab"), {"a": 2, "b": 1}),
        (OrderedDict(a=1), {"a": 1}),
        (Point(1, 2), (1, 2)),
        (Shouting("honest"), "honest"),
    ],
)
def test_a_subclass_travels_as_the_builtin_it_holds(value: object, plain: object) -> None:
    assert sent(value) == plain
    assert type(sent(value)) is type(plain)


@pytest.mark.parametrize("value", [object(), range(3), iter([]), 1j, len, int, bytearray(b"x"), {1: [{2: object()}]}])
def test_other_objects_do_not_travel(value: object) -> None:
    with pytest.raises(NotLiteral, match="an object of type"):
        encode(value)


def test_depth_count_and_size_are_bounded_on_both_sides() -> None:
    deep: list[object] = []
    for _ in range(DEEPEST):
        deep = [deep]
    encoded = encode(deep)
    assert sent(deep) == deep
    with pytest.raises(NotLiteral, match="deeper"):
        encode([deep])
    with pytest.raises(NotLiteral, match="deeper"):
        decode(["list", [encoded]])
    with pytest.raises(NotLiteral, match="values"):
        encode([0] * MOST_NODES)
    with pytest.raises(NotLiteral, match="values"):
        decode(["list", [0] * MOST_NODES])
    with pytest.raises(NotLiteral, match="bytes"):
        write_message({"value": "x" * LARGEST_MESSAGE})


@pytest.mark.parametrize(
    "form",
    [
        [],
        {},
        {"value": 1},
        ["object", []],
        ["list"],
        ["list", {}],
        ["list", [], []],
        ["int", 5],
        ["int", "xyz"],
        ["float", "1.0"],
        ["bytes", "0"],
        ["set", [["list", []]]],
        ["frozenset", [["dict", []]]],
        ["dict", [[1]]],
        ["dict", [1, 2]],
        ["dict", [[["list", []], 1]]],
        float("inf"),
    ],
)
def test_a_malformed_form_is_refused(form: object) -> None:
    with pytest.raises(NotLiteral):
        decode(form)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists))
def test_no_form_gives_anything_but_plain_values_or_a_refusal(form: object) -> None:
    try:
        value = decode(form)
    except NotLiteral:
        return
    assert types(sent(value)) == types(value)


@pytest.mark.parametrize(
    "line", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}", json.dumps(1).encode()]
)
def test_a_line_that_is_no_message_is_refused(line: bytes) -> None:
    with pytest.raises(NotLiteral):
        read_message(line)
