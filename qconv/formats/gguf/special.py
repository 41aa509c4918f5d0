"""A GGUF file's special tokens: the ids that its keys name, and every token that ends an answer."""

from __future__ import annotations

from gguf import Keys

from qconv.errors import CheckpointError
from qconv.formats.gguf.reader import GgufModel

_END_KEYS = (
    Keys.Tokenizer.EOS_ID,
    Keys.Tokenizer.EOT_ID,
    Keys.Tokenizer.EOM_ID,
)
EOS_IDS = "tokenizer.ggml.eos_token_ids"
"""Several ends as a list, which Ollama's converter writes."""

END_OF_MESSAGE = "<|eom_id|>"
END_TEXTS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    END_OF_MESSAGE,
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001 - DeepSeek's own bars
)
"""Tokens at whose text llama.cpp ends an answer, whatever the keys say."""


def token_id(model: GgufModel, key: str, vocabulary: int) -> int | None:
    """A special token's id, None where the file names none.

    Raises:
        CheckpointError: it is no row of the embedding.
    """
    value = model.metadata.get(key)
    if value is None:
        return None
    return _checked(model, key, value, vocabulary)


def end_ids(model: GgufModel, vocabulary: int) -> list[int]:
    """The ids of all tokens that end an answer, the file's end of sequence first.

    They are those that the keys name, and those that llama.cpp knows by their text.

    Raises:
        CheckpointError: one is no row of the embedding.
    """
    named = [token_id(model, key, vocabulary) for key in _END_KEYS]
    several = model.metadata.get(EOS_IDS)
    if several is not None:
        if isinstance(several, int | float | str):
            raise _malformed(model, EOS_IDS, several)
        named += [_checked(model, EOS_IDS, value, vocabulary) for value in list(several)]
    tokens = model.metadata.get(Keys.Tokenizer.LIST)
    known = set(END_TEXTS)
    by_text = [number for number, token in enumerate(tokens) if token in known] if isinstance(tokens, list) else []
    return list(dict.fromkeys(number for number in (*named, *by_text) if number is not None))


def _checked(model: GgufModel, key: str, value: object, vocabulary: int) -> int:
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < vocabulary:
        raise _malformed(model, key, number)
    return number


def _malformed(model: GgufModel, key: str, value: object) -> CheckpointError:
    return CheckpointError(
        f"{model.files[0]}: {key} is {str(value)[:80]!r}, no row of the embedding.",
        hint="The file is damaged, or of another kind.",
    )
