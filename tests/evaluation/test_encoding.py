"""Texts in parts give the tokens and bytes of the whole text, in the memory of a part."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qconv.evaluation import encoding
from qconv.evaluation.encoding import encode, encode_pieces
from qconv.runtime.tokenizer import load_tokenizer
from tests.conftest import BUNDLED

PART, MARGIN = 600, 64
ODDITIES = ("a" * 100, " " * 90, "\n" * 70, "é🙂漢" * 30, "\t\n \n", "def f(x):\n    return x\n", "x = 1\r\n", "_" * 80)


@functools.cache
def tokenizer() -> Any:
    return load_tokenizer(BUNDLED)


def pieces_of(text: str, size: int = 77) -> Iterator[str]:
    return (text[start : start + size] for start in range(0, len(text), size))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "PART", PART)
    monkeypatch.setattr(encoding, "MARGIN", MARGIN)


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(0, 60), st.none() | st.integers(1, 700))
def test_parts_give_what_the_whole_gives(seed: int, length: int, most: int | None) -> None:
    text = "".join(random.Random(seed).choices(ODDITIES, k=length))
    whole = encode(tokenizer(), "x", text)
    found = encode_pieces(tokenizer(), "x", pieces_of(text), most)
    np.testing.assert_array_equal(found.ids, whole.ids[:most])
    np.testing.assert_array_equal(found.nbytes, whole.nbytes[:most])


def test_no_more_is_read_than_is_of_use() -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield "total += 1\n"

    found = encode_pieces(tokenizer(), "x", endless(), 100)
    assert len(found.ids) == 100
    assert 11 * read < 2 * PART  # a part, and what completes it


def test_one_part_is_tokenized_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []

    def counted(made: Any, text: str, control_tokens: bool) -> Any:
        lengths.append(len(text))
        return original(made, text, control_tokens)

    original = encoding._tokenized
    monkeypatch.setattr(encoding, "_tokenized", counted)
    encode_pieces(tokenizer(), "x", pieces_of("total += 1\n" * 1000))
    assert len(lengths) > 10
    assert max(lengths) < PART + 77 + 2 * MARGIN + 11  # what was left, a part, its last piece, the line that was cut


def test_bytes_are_those_of_utf_8() -> None:
    text = "a é 漢 🙂"
    assert encode(tokenizer(), "x", text).nbytes.sum() == len(text.encode())
