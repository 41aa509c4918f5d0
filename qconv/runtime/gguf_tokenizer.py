"""The tokenizer that a GGUF file describes, as llama.cpp reads it: byte-level BPE and SentencePiece's BPE."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from gguf import Keys, TokenType
from numpy import ndarray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from qconv.errors import CheckpointError
from qconv.formats.gguf.pre_tokenizers import PRE_TOKENIZERS
from qconv.formats.gguf.reader import GgufModel
from qconv.formats.gguf.sentencepiece import SPACE
from qconv.formats.gguf.special import END_TEXTS, end_ids, token_id

_TEMPLATES = Keys.Tokenizer.CHAT_TEMPLATE + "."


def gguf_tokenizer(model: GgufModel) -> Any:
    """transformers' tokenizer of a GGUF model.

    Raises:
        CheckpointError: it describes none, a malformed one, or one that qconv does not read; names the key.
    """
    from transformers import PreTrainedTokenizerFast

    described = _Described(model)
    made: Any = PreTrainedTokenizerFast
    return made(
        tokenizer_object=described.tokenizer(),
        **described.special_tokens(),
        chat_template=described.chat_template(),
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


class _Described:
    def __init__(self, model: GgufModel) -> None:
        self.model = model
        self.kind = self._text(Keys.Tokenizer.MODEL)
        self.tokens = self._texts(Keys.Tokenizer.LIST)
        self.vocabulary = {token: number for number, token in enumerate(self.tokens)}
        if len(self.vocabulary) != len(self.tokens):
            raise self._error(Keys.Tokenizer.LIST, "has a token twice")
        self.types = self._types()

    def tokenizer(self) -> Tokenizer:
        if self.kind == "gpt2":
            made, adds_bos = self._byte_level()
        elif self.kind == "llama":
            made, adds_bos = self._sentencepiece(), True
        else:
            raise self._error(Keys.Tokenizer.MODEL, f"is {self.kind[:80]!r}; gpt2 and llama are read")
        made.add_tokens(list(self._added()))
        self._add_around(made, adds_bos)
        return made

    def special_tokens(self) -> dict[str, str]:
        """Their texts, by transformers' names. The first of several ends is the end of sequence."""
        rows = len(self.tokens)
        ends = end_ids(self.model, rows)
        ids = {
            "bos_token": token_id(self.model, Keys.Tokenizer.BOS_ID, rows),
            "eos_token": ends[0] if ends else None,
            "pad_token": token_id(self.model, Keys.Tokenizer.PAD_ID, rows),
            "unk_token": token_id(self.model, Keys.Tokenizer.UNK_ID, rows),
        }
        return {name: self.tokens[number] for name, number in ids.items() if number is not None}

    def chat_template(self) -> str | dict[str, str] | None:
        """The template, or all by name where there are several."""
        named = [key for key in self.model.metadata if key.startswith(_TEMPLATES)]
        others = {key.removeprefix(_TEMPLATES): self._text(key) for key in named}
        if Keys.Tokenizer.CHAT_TEMPLATE not in self.model.metadata:
            return others or None
        default = self._text(Keys.Tokenizer.CHAT_TEMPLATE)
        return {"default": default} | others if others else default

    def _byte_level(self) -> tuple[Tokenizer, bool]:
        # Files without the key are of before 2024, and llama.cpp guesses.
        name = self._text(Keys.Tokenizer.PRE) if Keys.Tokenizer.PRE in self.model.metadata else "default"
        if name not in PRE_TOKENIZERS:
            raise self._error(
                Keys.Tokenizer.PRE, f"is {name[:80]!r}, a way of cutting text that qconv does not know", self._BESIDE
            )
        pre = PRE_TOKENIZERS[name]
        merges = [self._merge(merge) for merge in self._texts(Keys.Tokenizer.MERGES)]
        made = Tokenizer(self._bpe(merges, ignore_merges=pre.ignores_merges))
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(split), behavior="isolated") for split in pre.splits),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        made.decoder = decoders.ByteLevel()
        return made, pre.adds_bos

    def _sentencepiece(self) -> Tokenizer:
        """BPE by the scores of what a merge makes, over text whose spaces are letters; unknown letters are bytes."""
        if self.model.metadata.get(Keys.Tokenizer.REMOVE_EXTRA_WS):
            raise self._error(Keys.Tokenizer.REMOVE_EXTRA_WS, "is true, which qconv does not read", self._BESIDE)
        scores = self.model.metadata.get(Keys.Tokenizer.SCORES)
        if not isinstance(scores, ndarray) or len(scores) != len(self.tokens):
            raise self._error(Keys.Tokenizer.SCORES, "is not a number for each token")
        unknown = token_id(self.model, Keys.Tokenizer.UNK_ID, len(self.tokens)) or 0
        merges = _merges_by_score(self.vocabulary, scores.tolist())
        made = Tokenizer(self._bpe(merges, unk_token=self.tokens[unknown], fuse_unk=True, byte_fallback=True))
        prefixed = self._flag(Keys.Tokenizer.ADD_PREFIX, True)
        spaced = normalizers.Replace(" ", SPACE)
        made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaced]) if prefixed else spaced
        steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
        return made

    def _bpe(self, merges: list[tuple[str, str]], **options: Any) -> BPE:
        try:
            return BPE(vocab=self.vocabulary, merges=merges, **options)
        # The library raises a bare Exception for a merge of what is no token, and TypeError for a broken letter.
        except Exception as error:
            raise self._error(Keys.Tokenizer.MERGES, f"does not fit the tokens: {error}") from error

    def _added(self) -> Iterator[AddedToken]:
        """Tokens that are found in a text before it is cut: those of the user, and the special ones."""
        for token, type in zip(self.tokens, self.types, strict=True):
            special = type in (TokenType.CONTROL, TokenType.UNKNOWN) or token in END_TEXTS
            if token and (special or type == TokenType.USER_DEFINED):
                yield AddedToken(token, normalized=False, special=special)

    def _add_around(self, made: Tokenizer, adds_bos: bool) -> None:
        """BOS before and EOS after every text, where the file says so."""
        pieces, special = ["$A"], []
        for key, kind, default in (
            (Keys.Tokenizer.ADD_BOS, Keys.Tokenizer.BOS_ID, adds_bos),
            (Keys.Tokenizer.ADD_EOS, Keys.Tokenizer.EOS_ID, False),
        ):
            if not self._flag(key, default):
                continue
            number = token_id(self.model, kind, len(self.tokens))
            if number is None:
                raise self._error(kind, f"is absent, and {key} asks for that token")
            token = self.tokens[number]
            pieces = [token, *pieces] if kind == Keys.Tokenizer.BOS_ID else [*pieces, token]
            special.append((token, number))
        if special:
            made.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=special)

    def _merge(self, merge: str) -> tuple[str, str]:
        # A part may begin with a space where a vocabulary is not byte-level.
        left, _, right = merge[1:].partition(" ")
        if not right:
            raise self._error(Keys.Tokenizer.MERGES, f"has {merge[:80]!r}, which is no pair")
        return merge[0] + left, right

    def _types(self) -> Sequence[int]:
        types = self.model.metadata.get(Keys.Tokenizer.TOKEN_TYPE)
        if types is None:
            return [TokenType.NORMAL] * len(self.tokens)
        if not isinstance(types, ndarray) or len(types) != len(self.tokens):
            raise self._error(Keys.Tokenizer.TOKEN_TYPE, "is not a number for each token")
        found: list[int] = types.tolist()
        return found

    def _text(self, key: str) -> str:
        value = self.model.metadata.get(key)
        if not isinstance(value, str) or _is_broken(value):
            raise self._error(key, "is absent" if value is None else "is no text")
        return value

    def _texts(self, key: str) -> list[str]:
        value = self.model.metadata.get(key)
        if not isinstance(value, list) or not value:
            raise self._error(key, "is absent" if value is None else "is no list of texts")
        if any(map(_is_broken, value)):
            raise self._error(key, "holds what is not UTF-8")
        return value

    def _flag(self, key: str, default: bool) -> bool:
        value = self.model.metadata.get(key, default)
        if not isinstance(value, bool):
            raise self._error(key, "is neither true nor false")
        return value

    _BESIDE = "Put the tokenizer files of the original model beside it."

    def _error(self, key: str, what: str, hint: str = "The file is damaged, or of another kind.") -> CheckpointError:
        return CheckpointError(f"{self.model.files[0]}: {key} {what}.", hint=hint)


def _merges_by_score(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, the best score of what is made first."""
    found = [
        (-scores[number], number, token[:place], token[place:])
        for token, number in vocabulary.items()
        for place in range(1, len(token))
        if token[:place] in vocabulary and token[place:] in vocabulary
    ]
    return [(left, right) for _, _, left, right in sorted(found)]


def _is_broken(text: str) -> bool:
    """Whether it holds bytes that were no UTF-8, which the header's reader keeps as surrogates."""
    return any("\ud800" <= character <= "\udfff" for character in text)
