"""SentencePiece's BPE as scores: in the order of the merges, and refused where no scores say the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType

from qconv.errors import CheckpointError, UsageError
from qconv.formats.gguf.tokenizer import tokenizer_metadata

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MERGES = [("a", "b"), ("▁", "ab"), ("▁a", "b"), ("▁", "a")]
TOKENS = ["<unk>", "<s>", "</s>", *BYTES, "▁ab", "▁a", "ab", "▁", "a", "b"]
SPECIAL = [
    {"id": number, "content": token, "special": True, "normalized": False} for number, token in enumerate(TOKENS[:3])
]
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Prepend", "prepend": "▁"}

Change = Callable[[dict[str, Any]], Any]


def described() -> dict[str, Any]:
    """A tokenizer.json as transformers 5 writes it: a handful of tokens."""
    return {
        "added_tokens": SPECIAL,
        "normalizer": None,
        "pre_tokenizer": METASPACE,
        "post_processor": None,
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "fuse_unk": True,
            "unk_token": None,
            "vocab": {token: number for number, token in enumerate(TOKENS)},
            "merges": [list(pair) for pair in MERGES],
        },
    }


def keys_of(folder: Path, change: Change = lambda _: None) -> dict[str, Any]:
    """The metadata of that tokenizer after a change, for two rows more than it has tokens."""
    values = described()
    change(values)
    (folder / "tokenizer.json").write_text(json.dumps(values))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return {key: value.value for key, value in tokenizer_metadata(folder, len(TOKENS) + 2, {}).items()}


def test_scores_fall_in_the_order_of_what_merges_make(tmp_path: Path) -> None:
    keys = keys_of(tmp_path)
    tokens = keys.pop("tokenizer.ggml.tokens")
    assert tokens == [*TOKENS, "[PAD265]", "[PAD266]"]
    scores = dict(zip(tokens, keys.pop("tokenizer.ggml.scores"), strict=True))
    assert [scores.pop(token) for token in ("ab", "▁ab", "▁a")] == [0.0, -1.0, -2.0]
    assert {*scores.values()} == {-3.0}
    types = dict(zip(tokens, keys.pop("tokenizer.ggml.token_type"), strict=True))
    assert types["<unk>"] is TokenType.UNKNOWN
    assert types["<s>"] is types["</s>"] is TokenType.CONTROL
    assert {types[token] for token in BYTES} == {TokenType.BYTE}
    assert types["▁ab"] is types["b"] is TokenType.NORMAL
    assert types["[PAD265]"] is TokenType.UNUSED
    assert keys == {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
    }


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "prefixed"),
    [
        ({"type": "Sequence", "normalizers": [PREPEND, REPLACE]}, None, True),
        ({"type": "Sequence", "normalizers": [REPLACE]}, None, False),
        (REPLACE, None, False),
        (None, METASPACE | {"prepend_scheme": "always"}, True),
        (None, METASPACE | {"prepend_scheme": "never"}, False),
        (None, {"type": "Metaspace", "replacement": "▁", "add_prefix_space": False, "split": False}, False),
    ],
)
def test_each_way_of_writing_spaces(tmp_path: Path, normalizer: Any, pre_tokenizer: Any, prefixed: bool) -> None:
    def change(values: dict[str, Any]) -> None:
        values.update(normalizer=normalizer, pre_tokenizer=pre_tokenizer)

    assert keys_of(tmp_path, change)["tokenizer.ggml.add_space_prefix"] is prefixed


def merges(*pairs: tuple[str, str]) -> Change:
    return lambda values: values["model"].update(merges=[list(pair) for pair in pairs])


def without_a_byte(values: dict[str, Any]) -> None:
    values["model"]["vocab"]["<no byte>"] = values["model"]["vocab"].pop("<0x0A>")


REFUSED: dict[str, tuple[Change, str]] = {
    "merges apart": (
        merges(("a", "b"), ("▁", "ab"), ("▁", "a"), ("▁a", "b")),
        "merges into '▁ab' lie apart",
    ),
    "a pair that is not merged": (merges(("a", "b"), ("▁", "ab"), ("▁", "a")), "does not merge '▁a' and 'b'"),
    "a byte without a token": (without_a_byte, "without a token for <0x0A>"),
    "words apart": (lambda values: values.update(pre_tokenizer=METASPACE | {"split": True}), "more than write spaces"),
    "another letter": (
        lambda values: values.update(pre_tokenizer=METASPACE | {"replacement": "_"}),
        "more than write spaces",
    ),
    "a normalizer": (lambda values: values.update(normalizer={"type": "NFKC"}), "more than write spaces"),
    "dropout": (lambda values: values["model"].update(dropout=0.1), "dropout 0.1"),
    "ignored merges": (lambda values: values["model"].update(ignore_merges=True), "ignore_merges True"),
    "a scheme of no kind": (
        lambda values: values.update(pre_tokenizer=METASPACE | {"prepend_scheme": "x"}),
        "more than write spaces",
    ),
    "no merges": (merges(), "a tokenizer without merges"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_would_do_otherwise_is_refused(tmp_path: Path, name: str) -> None:
    change, what = REFUSED[name]
    with pytest.raises(UsageError) as caught:
        keys_of(tmp_path, change)
    assert what in caught.value.message


def test_a_damaged_merge_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="merge 'ab' is malformed"):
        keys_of(tmp_path, lambda values: values["model"].update(merges=["ab"]))


@pytest.mark.parametrize("token", ["a", "▁", "ab"])
def test_a_merge_of_what_is_no_token_is_named(tmp_path: Path, token: str) -> None:
    def change(values: dict[str, Any]) -> None:
        values["model"]["vocab"][f"<no {token}>"] = values["model"]["vocab"].pop(token)

    with pytest.raises(CheckpointError, match=f"{token!r} is no token"):
        keys_of(tmp_path, change)
