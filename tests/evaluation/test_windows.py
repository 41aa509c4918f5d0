"""Which tokens are scored, from which context, and what each stands for."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qconv.calibration.corpus import load_tokenizer
from qconv.evaluation.encoding import Encoded, encode
from qconv.evaluation.windows import LEAST_UNITS, cut, sliding
from tests.conftest import BUNDLED


@functools.cache
def bundled_tokenizer() -> Any:
    return load_tokenizer(BUNDLED)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return bundled_tokenizer()


def document(name: str, length: int, start: int = 0) -> Encoded:
    ids = np.arange(start, start + length, dtype=np.int32)
    return Encoded(name, ids, np.full(length, 2, dtype=np.int32))


@given(st.integers(2, 400), st.integers(16, 64), st.integers(1, 64))
def test_every_token_but_the_first_is_scored_once_with_enough_context(length: int, context: int, stride: int) -> None:
    stride = min(stride, context - 1)
    scored: Counter[int] = Counter()
    for start, first, stop in sliding(length, context, stride):
        assert start < first < stop <= start + context
        if start:
            assert first - start >= context - stride
        scored.update(range(first, stop))
    assert scored == Counter(range(1, length))


def test_llama_cpp_scores_257_to_511_of_each_window() -> None:
    documents = [document("a", 1000), document("b", 600, 1000)]
    text = cut(documents, "", rule="llama.cpp", context=512, stride=1, tokens=10**6)
    assert len(text.windows) == 3  # 1,600 tokens; the last 64 do not fill a window
    assert text.scored == 3 * 255
    for index, window in enumerate(text.windows):
        assert window.ids.tolist() == list(range(512 * index, 512 * index + 512))
        assert window.targets.tolist() == list(range(512 * index + 257, 512 * index + 512))


def test_llama_cpp_gives_each_token_to_its_document() -> None:
    documents = [document(f"d{index}", 130, 130 * index) for index in range(60)]
    text = cut(documents, "", rule="llama.cpp", context=512, stride=1, tokens=10**6)
    assert text.unit == "document"
    for window in text.windows:
        for token, unit in zip(window.targets, window.units, strict=True):
            assert text.units[unit] == f"d{token // 130}"
    # Documents that lie wholly in unscored halves are no units.
    assert set(np.unique(np.concatenate([window.units for window in text.windows]))) == set(range(len(text.units)))


def test_bos_takes_the_place_of_a_windows_first_token_and_precedes_a_document() -> None:
    stream = cut([document("a", 2048, 10)], "", rule="llama.cpp", context=512, stride=1, bos=[7], tokens=10**6)
    assert [window.ids[:2].tolist() for window in stream.windows] == [[7, 11], [7, 523], [7, 1035], [7, 1547]]
    alone = cut([document("a", 20, 10)], "", rule="documents", context=512, stride=256, bos=[7], tokens=10**6)
    assert alone.windows[0].ids.tolist() == [7, *range(10, 30)]
    assert alone.windows[0].targets.tolist() == list(range(10, 30))  # with BOS before it, the first is scored too
    assert alone.windows[0].nbytes.sum() == 40


def test_documents_are_cut_to_size_and_read_no_further_than_needed() -> None:
    def endless() -> Any:
        for index in range(10**9):
            yield document(f"d{index}", 100)

    text = cut(endless(), "", rule="documents", context=64, stride=32, tokens=1000, document_tokens=51)
    assert text.scored == 1000
    assert len(text.units) == 20
    assert text.unit == "document"


def test_few_documents_are_resampled_by_window() -> None:
    text = cut([document("only", 2000)], "", rule="documents", context=100, stride=50, tokens=10**6)
    assert text.unit == "window"
    assert len(text.units) == len(text.windows) > LEAST_UNITS
    assert [set(window.units.tolist()) for window in text.windows] == [{index} for index in range(len(text.windows))]


def test_the_digest_covers_tokens_windows_and_units() -> None:
    def digest(length: int = 600, context: int = 512, start: int = 0, name: str = "a") -> str:
        documents = [document(f"{name}{index}", length, start) for index in range(LEAST_UNITS)]
        return cut(documents, "", rule="documents", context=context, stride=256, tokens=10**6).digest()

    assert digest() == digest()
    assert len({digest(), digest(601), digest(context=400), digest(start=1), digest(name="b")}) == 5


@given(text=st.text(max_size=200))
def test_bytes_of_tokens_add_up_to_those_of_the_text(text: str) -> None:
    found = encode(bundled_tokenizer(), "", text)
    assert len(found.ids) == len(found.nbytes)
    assert (found.nbytes >= 0).all()
    assert found.nbytes.sum() == len(text.encode())


def test_bytes_are_each_tokens_own(tokenizer: Any) -> None:
    text = "def größe(x):\n    return '€' * x\n"
    found = encode(tokenizer, "", text)
    # A byte-level token is written with one character a byte.
    tokens = tokenizer.convert_ids_to_tokens(found.ids.tolist())
    expected = [len(token) for token in tokens]
    assert found.nbytes.sum() == sum(expected) == len(text.encode())
    plain = [index for index, token in enumerate(tokens) if token.isascii()]
    assert [found.nbytes[index] for index in plain] == [expected[index] for index in plain]


def test_control_tokens_in_plain_text_are_text(tokenizer: Any) -> None:
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in encode(tokenizer, "", "x <|im_end|>").ids
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in encode(tokenizer, "", "<|im_end|>", control_tokens=True).ids
