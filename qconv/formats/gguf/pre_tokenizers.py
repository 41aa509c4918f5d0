"""How llama.cpp cuts text before byte-level BPE, by the name that ``tokenizer.ggml.pre`` gives it.

The patterns are those of the models' own tokenizer.json; each name was compared with llama.cpp b11549 token by token.
Names that are not here are refused: with another way of cutting, text becomes other tokens, and nobody would see it.
"""

from __future__ import annotations

from dataclasses import dataclass

from qconv.checkpoint.tiktoken import KIMI

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = rf"{_WORDS}\p{{N}}{_REST}"
LLAMA3 = rf"{_WORDS}\p{{N}}{{1,3}}{_REST}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_FIRST = r"[^\r\n\p{L}\p{N}]?"
_AFTER_CASES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_FIRST}{_UPPER}*{_LOWER}+|{_FIRST}{_UPPER}+{_LOWER}*|\p{{N}}{_AFTER_CASES}"
_GPT4O = (
    rf"{_FIRST}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_FIRST}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}{_AFTER_CASES}"
)
_SEED = rf"{_WORDS}\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_EXAONE_MOE = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """What llama.cpp does under one name.

    Attributes:
        splits: Patterns that cut what those before them left, each match apart.
        ignores_merges: Whether a word that is itself a token is taken whole, whatever the merges say.
        adds_bos: Whether a text begins with BOS where the file does not say.
    """

    splits: tuple[str, ...]
    ignores_merges: bool = False
    adds_bos: bool = False


_KINDS: dict[PreTokenizer, tuple[str, ...]] = {
    PreTokenizer((GPT2,)): (
        "gpt-2",
        "phi-2",
        "gigachat",
        "a.x-4.0",
        "mellum",
        "mpt",
        "olmo",
        "jais",
        "exaone4",
        "trillion",
    ),
    PreTokenizer((QWEN2,)): (
        "qwen2",
        "deepseek-r1-qwen",
        "kormo",
        "f2llmv2",
        "megrez",
        "stablelm2",
        "hunyuan",
        "solar-open",
        "grok-2",
    ),
    PreTokenizer((LLAMA3,), ignores_merges=True, adds_bos=True): (
        "llama-bpe",
        "llama3",
        "llama-v3",
        "falcon3",
        "falcon-h1",
        "pixtral",
        "midm-2.0",
        "lfm2",
        "jina-v5-nano",
    ),
    PreTokenizer((LLAMA3,)): ("glm4", "chatglm-bpe", "dbrx", "smaug-bpe"),
    PreTokenizer((r"\p{N}", GPT2)): (
        "starcoder",
        "refact",
        "command-r",
        "smollm",
        "codeshell",
        "exaone",
        "minerva-7b",
    ),
    PreTokenizer((_TEKKEN,), ignores_merges=True, adds_bos=True): ("tekken",),
    PreTokenizer((_GPT4O,)): ("gpt-4o", "llama4", "kanana2", "minimax-m2"),
    PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")): ("deepseek-coder",),
    PreTokenizer((r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK_V3)): (
        "deepseek-v3",
        "hunyuan-dense",
        "joyai-llm",
    ),
    PreTokenizer((_SEED,)): ("seed-coder",),
    PreTokenizer((_EXAONE_MOE,)): ("exaone-moe",),
    PreTokenizer((KIMI,)): ("kimi-k2",),
}
PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: kind for kind, names in _KINDS.items() for name in names}
"""By llama.cpp's name."""


def name_of_kind(splits: tuple[str, ...], *, ignores_merges: bool) -> str | None:
    """llama.cpp's name of that way of cutting, the first of several; None where it has none."""
    for kind, names in _KINDS.items():
        if (kind.splits, kind.ignores_merges) == (splits, ignores_merges):
            return names[0]
    return None


def written_names() -> list[str]:
    """A name of every way of cutting."""
    return [names[0] for names in _KINDS.values()]
