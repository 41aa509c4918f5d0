"""What travels arrives as the same plain value; what is not plain, too large or malformed does not arrive."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qconv.evaluation.sandbox.literals import (
    DEEPEST,
    LARGEST_MESSAGE,
    MOST_NODES,
    Foreign,
    Literal,
    NotLiteral,
    decode,
    encode,
    read_message,
    write_message,
)

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.fractions()
    | st.decimals(allow_nan=False)
    | st.text()
    | st.binary()
    | st.just(10**400)
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


class Same:
    def __eq__(self, other: object) -> bool:
        return True

    def __sub__(self, other: object) -> float:
        return 0.0

    __hash__ = None  # type: ignore[assignment]  # as Python itself does where only __eq__ is defined


class Endless:
    def __iter__(self) -> Iterator[int]:
        return count()


def failing() -> Iterator[int]:
    yield 1
    raise KeyError


@pytest.mark.parametrize(
    ("value", "true", "items"),
    [
        (range(3), True, (0, 1, 2)),
        (range(0), False, ()),
        ((x * 2 for x in [1, 2]), True, (2, 4)),
        (iter([]), True, ()),
        (map(str, [1]), True, ("1",)),
        (zip([1], [2], strict=True), True, ((1, 2),)),
        ({"a": 1}.keys(), True, ("a",)),
        ({"a": 1}.items(), True, (("a", 1),)),
        ({}.values(), False, ()),
        (deque([1]), True, (1,)),
        (bytearray(b"x"), True, (120,)),
        (re.match("a", "a"), True, None),
        (object(), True, None),
        (len, True, None),
        (Same(), True, None),
        (Endless(), True, None),
        (failing(), True, None),
    ],
)
def test_of_other_objects_truth_and_items_travel(value: object, true: bool, items: object) -> None:
    arrived = sent(value)
    assert isinstance(arrived, Foreign)
    assert bool(arrived) is true
    assert arrived != items
    if items is None:
        with pytest.raises((TypeError, ValueError), match=r"no items|does not end"):
            tuple(arrived)
    else:
        assert tuple(arrived) == items
    with pytest.raises(TypeError):
        arrived - 1  # type: ignore[operator]  # that it has none is the point


def test_within_containers_too() -> None:
    arrived = sent([iter([1, 2])])
    assert isinstance(arrived, list)
    assert isinstance(arrived[0], Foreign)
    assert list(arrived[0]) == [1, 2]
    assert arrived != [[1, 2]]


class Undecided:
    def __bool__(self) -> bool:
        raise ValueError


def test_what_is_neither_true_nor_false_does_not_travel() -> None:
    with pytest.raises(NotLiteral, match="of type Undecided that is neither"):
        encode({1: [Undecided()]})


def test_items_are_bounded_with_all_else() -> None:
    arrived = sent(iter(range(MOST_NODES)))
    assert isinstance(arrived, Foreign)
    with pytest.raises(ValueError, match="does not end"):  # one more than there may be, with the object itself
        tuple(arrived)
    assert len(tuple(sent(iter(range(MOST_NODES - 1))))) == MOST_NODES - 1  # type: ignore[arg-type]  # as above
    nested = sent(list(range(200)) for _ in count())
    assert nested
    with pytest.raises(ValueError, match="does not end"):
        tuple(nested)  # type: ignore[arg-type]  # as above


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
        ["complex", "1"],
        ["complex", "1", "x"],
        ["fraction", "1", "0"],
        ["fraction", "1", "1" + "0" * 1024],
        ["decimal", "x"],
        ["decimal", "1E+5000"],
        ["decimal", "1E+" + "9" * 30],
        ["decimal", "1" * 5000],
        ["foreign", 1, [], True],
        ["foreign", True, None, False],
        ["foreign", True, {}, True],
        ["set", [["decimal", "sNaN"]]],
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
