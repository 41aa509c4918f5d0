"""A tokenizer as Kimi publishes it, small: ranks of tiktoken, and settings that name code which nobody runs."""

from __future__ import annotations

import base64
import itertools
import json
from collections import Counter
from pathlib import Path

import regex  # type: ignore[import-untyped]  # it ships no types

from qconv.checkpoint.tiktoken import KIMI

TEXT = (
    "def encode(self, text: str) -> list[int]:\n    return [self.ranks[token] for token in text]\n\n"
    "The HTTPServer doesn't answer 12345 requests; it's an Error. 中文字符在这里汉字和英文abc混合。\r\n"
    "Größe, naïve café, ÀÉÎ, Привет мир, שלום, 日本語テキスト   and   spaces\n\n\n"
) * 8
RANKS = 600
ROWS = RANKS + 256
NAMED = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 17: "<|im_middle|>"}
"""Special tokens by what is added to the number of ranks."""
TEMPLATE = (
    "{% for message in messages %}<|im_{{ message.role }}|>{{ message.role }}<|im_middle|>{{ message.content }}"
    "<|im_end|>{% endfor %}"
)


def words_of(text: str) -> list[str]:
    """A text, cut as Kimi's tokenizer cuts it."""
    found: list[str] = regex.findall(KIMI, text, flags=regex.VERSION1)
    return found


def learned_ranks() -> list[bytes]:
    """Tokens by rank: the bytes, then what joins the most frequent neighbours of the sample."""
    tokens = [bytes([byte]) for byte in range(256)]
    words = [[bytes([byte]) for byte in word.encode()] for word in words_of(TEXT)]
    while len(tokens) < RANKS:
        pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
        pairs = Counter({pair: count for pair, count in pairs.items() if pair[0] + pair[1] not in tokens})
        if not pairs:
            tokens.append(b"unused %d" % len(tokens))
            continue
        joined = max(pairs, key=lambda pair: (pairs[pair], pair))
        tokens.append(joined[0] + joined[1])
        for word in words:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == joined:
                    word[at : at + 2] = [joined[0] + joined[1]]
                at += 1
    return tokens


def save_kimi(folder: Path) -> Path:
    """The files; gives the folder."""
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(learned_ranks()))
    (folder / "tiktoken.model").write_text("".join(lines))
    (folder / "tokenization_kimi.py").write_text("raise RuntimeError('this is not run')\n")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    settings = {
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "added_tokens_decoder": {
            str(RANKS + number): {"content": text, "special": True} for number, text in NAMED.items()
        },
        **{"bos_token": "[BOS]", "eos_token": "[EOS]", "model_max_length": 1_000_000},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
