"""Kimi's tokenizer of its ranks: the tokens that tiktoken's rule gives, in transformers and in GGUF metadata."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from hypothesis import given
from hypothesis import strategies as st

from qconv.checkpoint.tiktoken import byte_letters, described, has_ranks, merges, read_ranks
from qconv.checkpoint.tokenizer import load_tokenizer
from qconv.errors import CheckpointError, UsageError
from qconv.formats.gguf.tokenizer import tokenizer_metadata
from tests.kimi import NAMED, ROWS, TEXT, save_kimi, words_of

Folder = Callable[[], Path]


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Kimi's; do not write to it."""
    return save_kimi(tmp_path_factory.mktemp("kimi"))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """One that may be damaged."""
    return save_kimi(tmp_path)


def by_rule(text: str, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's rule, word by word: the two neighbours of the least rank are joined, the first of equals."""
    found: list[int] = []
    for word in words_of(text):
        parts = [bytes([byte]) for byte in word.encode()]
        while True:
            joined = [ranks.get(left + right) for left, right in itertools.pairwise(parts)]
            known = [rank for rank in joined if rank is not None]
            if not known:
                break
            at = joined.index(min(known))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        found += [ranks[part] for part in parts]
    return found


PIECES = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["don't", "HTTPServer", "中文字", "a中b", "12345", "\r\n\n", "   x", "é", "ÀÉ", "'S", "_x", "١٢٣", "\u200b"]
    ),
)


@given(st.lists(PIECES, max_size=8).map("".join))
def test_text_has_the_tokens_of_tiktokens_rule(kimi: Path, text: str) -> None:
    ranks, tokenizer = read_ranks(kimi / "tiktoken.model"), loaded(kimi)
    assert tokenizer(text, add_special_tokens=False).input_ids == by_rule(text, ranks)
    assert tokenizer.decode(by_rule(text, ranks)) == text


_LOADED: dict[Path, Any] = {}


def loaded(folder: Path) -> Any:
    if folder not in _LOADED:
        _LOADED[folder] = load_tokenizer(folder)
    return _LOADED[folder]


def test_special_tokens_and_the_template(kimi: Path) -> None:
    tokenizer, first = loaded(kimi), ROWS - 256
    for number, text in NAMED.items():
        assert tokenizer(text).input_ids == [first + number]
    assert tokenizer(f"<|reserved_token_{first + 200}|>").input_ids == [first + 200]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("[BOS]", "[EOS]")
    assert tokenizer("a").input_ids == tokenizer("a", add_special_tokens=False).input_ids, "nothing is put before"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_user|>user<|im_middle|>hi<|im_end|>"
    assert len(tokenizer) == ROWS


def test_its_code_is_not_run(copy: Path) -> None:
    (copy / "tokenization_kimi.py").write_text(f"open({str(copy / 'ran')!r}, 'w')")
    load_tokenizer(copy)
    assert not (copy / "ran").exists()


def test_a_gguf_file_holds_the_same(kimi: Path) -> None:
    values = tokenizer_metadata(kimi, ROWS + 8, {"vocab_size": ROWS + 8})
    found = {name: field.value for name, field in values.items()}
    ranks, letters = read_ranks(kimi / "tiktoken.model"), byte_letters()
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "kimi-k2")
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert tokens[: len(ranks)] == ["".join(letters[byte] for byte in token) for token in ranks]
    assert tokens[len(ranks)] == "[BOS]"
    assert tokens[-1] == f"[PAD{ROWS + 7}]"
    kinds = [TokenType.NORMAL] * len(ranks) + [TokenType.CONTROL] * 256 + [TokenType.UNUSED] * 8
    assert types == kinds
    assert len(found["tokenizer.ggml.merges"]) == len([*merges(ranks)])
    assert found["tokenizer.ggml.eos_token_id"] == len(ranks) + 1
    assert not found["tokenizer.ggml.add_bos_token"]


def test_every_split_of_a_token_is_a_merge() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"bc": 257, b"abc": 258, b"xyz": 259}
    assert [*merges(ranks)] == [(b"a", b"b"), (b"b", b"c"), (b"a", b"bc"), (b"ab", b"c")]


def test_a_tokenizer_json_comes_first(copy: Path) -> None:
    assert has_ranks(copy)
    (copy / "tokenizer.json").write_text(json.dumps(described(copy)))
    assert not has_ranks(copy)


def line(token: bytes, rank: object) -> str:
    return f"{base64.b64encode(token).decode()} {rank}\n"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text + "nonsense\n", "line 601 is no token and rank"),
        (lambda text: text + "!!!! 5\n", "line 601 is no token and rank"),
        (lambda text: text + line(b"zzz", "x"), "line 601 is no token and rank"),
        (lambda text: text + line(b"a", 600), "line 601: its token is empty or there twice"),
        (lambda text: text + line(b"never seen", 700), "not all the numbers from 0 to 600"),
        (lambda text: text + line(b"never seen", 3), "not all the numbers from 0 to 600"),
        (lambda text: text.split("\n", 1)[1], "not all the numbers"),
        (lambda text: text.replace(line(b"a", 97), line(b"never seen", 97)), "the byte 0x61 is no token"),
        (lambda text: "", "the byte 0x00 is no token"),
    ],
)
def test_damaged_ranks_are_named(copy: Path, damage: Callable[[str], str], message: str) -> None:
    path = copy / "tiktoken.model"
    path.write_text(damage(path.read_text()))
    with pytest.raises(CheckpointError, match=rf"tiktoken\.model: .*{message}"):
        load_tokenizer(copy)


@pytest.mark.parametrize("number", ["12", "x", str(ROWS), "-1"])
def test_a_special_token_that_is_none_is_named(copy: Path, number: str) -> None:
    edit(copy, added_tokens_decoder={number: {"content": "[X]"}})
    with pytest.raises(CheckpointError, match=f"added_tokens_decoder: '{number}' is no special token's id"):
        load_tokenizer(copy)


@pytest.mark.parametrize("changes", [{"tokenizer_class": "QWenTokenizer"}, {"auto_map": {}}, {"auto_map": None}])
def test_ranks_of_other_models_are_refused(copy: Path, changes: dict[str, Any]) -> None:
    edit(copy, **changes)
    with pytest.raises(UsageError, match="Kimi's alone is known"):
        load_tokenizer(copy)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_sample_is_worth_something() -> None:
    assert len(TEXT) > 1000
