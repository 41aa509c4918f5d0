"""The tokenizer of a GGUF file: what llama.cpp does under each name, from a vocabulary in which it can be seen.

The interop tests compare every name with llama.cpp itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import TokenType

from qconv.errors import CheckpointError
from qconv.formats.gguf.header import Value
from qconv.formats.gguf.pre_tokenizers import PRE_TOKENIZERS
from qconv.formats.gguf.reader import GgufModel
from qconv.runtime.gguf_tokenizer import gguf_tokenizer

TOKENS = ["<s>", "</s>", "a", "b", "c", "1", "2", "ab", "abc", "12", "<tool>", "Ġ", "Ġa"]
TYPES = [TokenType.CONTROL] * 2 + [TokenType.NORMAL] * 8 + [TokenType.USER_DEFINED] + [TokenType.NORMAL] * 2
KEYS: dict[str, Value] = {
    "general.architecture": "llama",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": np.array([int(type) for type in TYPES], dtype=np.int32),
    # "abc" is a token that no merge makes.
    "tokenizer.ggml.merges": ["a b", "1 2", "Ġ a"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.chat_template": "{{ messages }}",
}


def tokenizer(**changes: Any) -> Any:
    """Of those keys with others, whose names are completed; None takes one away."""
    keys = {name: value for name, value in KEYS.items()}
    for name, value in changes.items():
        keys[f"tokenizer.ggml.{name}" if name != "chat_template" else "tokenizer.chat_template"] = value
    return gguf_tokenizer(GgufModel((Path("m.gguf"),), {k: v for k, v in keys.items() if v is not None}, {}))


def words(made: Any, text: str, **options: Any) -> list[str]:
    found: list[str] = made.convert_ids_to_tokens(made(text, **options).input_ids)
    return found


def test_merges_make_words() -> None:
    assert words(tokenizer(), "abc a12") == ["ab", "c", "Ġa", "1", "2"]  # qwen2 takes digits one by one


@pytest.mark.parametrize("pre", [name for name, kind in PRE_TOKENIZERS.items() if kind.ignores_merges])
def test_a_word_that_is_a_token_is_taken_whole_where_merges_are_ignored(pre: str) -> None:
    made = tokenizer(pre=pre)
    assert words(made, "abc a") == ["<s>", "abc", "Ġa"]  # and these begin every text with BOS
    assert words(tokenizer(pre=pre, add_bos_token=False), "abc") == ["abc"]


def test_the_files_own_word_on_bos_and_eos() -> None:
    made = tokenizer(add_bos_token=True, add_eos_token=True)
    assert words(made, "a") == ["<s>", "a", "</s>"]
    assert words(made, "a", add_special_tokens=False) == ["a"]
    with pytest.raises(CheckpointError, match="bos_token_id is absent"):
        tokenizer(add_bos_token=True, bos_token_id=None)


def test_tokens_of_the_user_are_found_always_and_special_ones_where_asked() -> None:
    made = tokenizer(tokens=[*TOKENS, "<", "t", "o", "l", ">"], token_type=None)
    assert words(made, "<tool>") == ["<", "t", "o", "o", "l", ">"]  # without types nothing is found whole
    made = tokenizer()
    assert words(made, "a<tool>b</s>") == ["a", "<tool>", "b", "</s>"]
    assert made.decode(made("a<tool>b</s>").input_ids, skip_special_tokens=True) == "a<tool>b"
    assert words(made, "a<tool>", split_special_tokens=True) == ["a", "<tool>"]


def test_the_template_and_several() -> None:
    assert tokenizer().chat_template == "{{ messages }}"
    model = GgufModel((Path("m.gguf"),), KEYS | {"tokenizer.chat_template.tool_use": "{{ tools }}"}, {})
    assert gguf_tokenizer(model).chat_template == {"default": "{{ messages }}", "tool_use": "{{ tools }}"}


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"pre": "what-comes-next"}, r"tokenizer\.ggml\.pre is 'what-comes-next', a way of cutting text"),
        ({"pre": None}, r"tokenizer\.ggml\.pre is 'default'"),
        ({"pre": 3}, r"tokenizer\.ggml\.pre is no text"),
        ({"model": "bert"}, r"tokenizer\.ggml\.model is 'bert'; gpt2 and llama are read"),
        ({"model": None}, r"tokenizer\.ggml\.model is absent"),
        ({"tokens": None}, r"tokenizer\.ggml\.tokens is absent"),
        ({"tokens": "a"}, r"tokenizer\.ggml\.tokens is no list of texts"),
        ({"tokens": [*TOKENS[:-1], "a"]}, r"tokenizer\.ggml\.tokens has a token twice"),
        ({"tokens": [*TOKENS[:-1], "\udcff"]}, r"tokenizer\.ggml\.tokens holds what is not UTF-8"),
        ({"token_type": np.zeros(3)}, r"tokenizer\.ggml\.token_type is not a number for each token"),
        ({"merges": ["ab"]}, r"tokenizer\.ggml\.merges has 'ab', which is no pair"),
        ({"merges": ["a q"]}, r"tokenizer\.ggml\.merges does not fit the tokens"),
        ({"eos_token_id": 99}, r"tokenizer\.ggml\.eos_token_id is '99', no row"),
        ({"add_bos_token": 1}, r"tokenizer\.ggml\.add_bos_token is neither true nor false"),
        ({"model": "llama"}, r"tokenizer\.ggml\.scores is not a number for each token"),
    ],
)
def test_what_is_malformed_or_unknown_is_refused_by_key(changes: dict[str, Any], error: str) -> None:
    with pytest.raises(CheckpointError, match=error):
        tokenizer(**changes)


def test_sentencepiece_by_scores_with_bytes_for_what_it_lacks() -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "c", "ab", "bc", "▁a"]
    scores = np.zeros(len(pieces), dtype=np.float32)
    scores[-3:] = [-2.0, -1.0, -3.0]  # bc before ab, whatever stands first
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256, *[TokenType.NORMAL] * 7]
    changes = {
        "model": "llama",
        "pre": None,
        "merges": None,
        "tokens": pieces,
        "scores": scores,
        "token_type": np.array([int(type) for type in types], dtype=np.int32),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    made = tokenizer(**changes)
    assert words(made, "abc a") == ["<s>", "▁a", "bc", "▁a"]
    assert words(made, "aé") == ["<s>", "▁a", "<0xC3>", "<0xA9>"]
    assert made.decode(made("abc aé").input_ids, skip_special_tokens=True) == "abc aé"
    assert words(tokenizer(**changes, add_space_prefix=False), "abc") == ["<s>", "a", "bc"]
