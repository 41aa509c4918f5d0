"""Kimi's tokenizer: published as tiktoken's ranks and as code, and made of the ranks alone, without running the code.

tiktoken merges the two neighbours whose joined bytes have the least rank, whichever they are. tokenizers merges pairs
that are listed, so every way to split a token in two others is listed, in the order of the tokens' ranks. How text is
cut before, and which ids are special tokens, is what Kimi's ``tokenization_kimi.py`` says.
"""

from __future__ import annotations

import base64
import binascii
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qconv.checkpoint.reader import read_json
from qconv.errors import CheckpointError, UsageError

RANKS_NAME = "tiktoken.model"
"""A line for each token: its bytes in base64, and its rank, which is its id."""
RESERVED = 256
"""Ids after the ranks that are special tokens, whether they have a name or not."""

_HAN = r"&&[^\p{Han}]"
_FIRST, _CONTRACTIONS = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{_HAN}]", rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{_HAN}]"
KIMI = "|".join(
    (
        r"[\p{Han}]+",
        rf"{_FIRST}{_UPPER}*{_LOWER}+{_CONTRACTIONS}",
        rf"{_FIRST}{_UPPER}+{_LOWER}*{_CONTRACTIONS}",
        *(r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"),
    )
)
"""How Kimi cuts text."""
_HINT = "Download it again."


def has_ranks(folder: Path) -> bool:
    """Whether a folder's tokenizer is such a one: it has ranks, and no tokenizer.json."""
    return (folder / RANKS_NAME).is_file() and not (folder / "tokenizer.json").is_file()


def described(folder: Path) -> dict[str, Any]:
    """The tokenizer as tokenizer.json would have it.

    Raises:
        CheckpointError: a file is missing or malformed.
        UsageError: the ranks are another model's, whose way to cut text is not known.
    """
    settings = read_json(folder / "tokenizer_config.json")
    if not _is_kimis(settings):
        raise UsageError(
            f"{folder / RANKS_NAME}: of tokenizers with ranks of tiktoken Kimi's alone is known, and "
            f"tokenizer_config.json names {settings.get('tokenizer_class')!r}.",
            hint="Save the tokenizer with transformers' save_pretrained as tokenizer.json.",
        )
    ranks = read_ranks(folder / RANKS_NAME)
    letters = byte_letters()
    texts = {token: "".join(letters[byte] for byte in token) for token in ranks}
    return {
        "version": "1.0",
        "added_tokens": list(_special(folder, settings, len(ranks))),
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": KIMI}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {texts[token]: rank for token, rank in ranks.items()},
            "merges": [[texts[left], texts[right]] for left, right in merges(ranks)],
        },
    }


@contextmanager
def as_files(folder: Path) -> Iterator[Path]:
    """A folder with tokenizer.json and what lies beside it, as transformers loads it, for as long as the body runs.

    Raises:
        CheckpointError, UsageError: as :func:`described`.
    """
    with tempfile.TemporaryDirectory(prefix="qconv-") as name:
        made = Path(name)
        (made / "tokenizer.json").write_text(json.dumps(described(folder)))
        settings = read_json(folder / "tokenizer_config.json")
        settings = {key: value for key, value in settings.items() if key not in ("auto_map", "added_tokens_decoder")}
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        (made / "tokenizer_config.json").write_text(json.dumps(settings))
        for file in folder.glob("chat_template.*"):
            if file.is_file():
                shutil.copyfile(file, made / file.name)
        yield made


def read_ranks(path: Path) -> dict[bytes, int]:
    """The tokens' bytes and ranks, the least first.

    Raises:
        CheckpointError: a line is none, a token or a rank is there twice, a rank or a byte is missing.
    """
    ranks: dict[bytes, int] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}.", hint=_HINT) from error
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            coded, rank = line.split()
            token = base64.b64decode(coded, validate=True)
            found = int(rank)
        except (ValueError, binascii.Error) as error:
            raise CheckpointError(f"{path}: line {number} is no token and rank.", hint=_HINT) from error
        if not token or token in ranks:
            raise CheckpointError(f"{path}: line {number}: its token is empty or there twice.", hint=_HINT)
        ranks[token] = found
    ordered = dict(sorted(ranks.items(), key=lambda item: item[1]))
    if [*ordered.values()] != [*range(len(ordered))]:
        raise CheckpointError(f"{path}: its ranks are not all the numbers from 0 to {len(ordered) - 1}.", hint=_HINT)
    missing = next((byte for byte in range(256) if bytes([byte]) not in ordered), None)
    if missing is not None:
        raise CheckpointError(f"{path}: the byte {missing:#04x} is no token.", hint=_HINT)
    return ordered


def merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Every way to split a token in two others, tokens in the order of their ranks."""
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs = [(left, right) for left, right in splits if left in ranks and right in ranks]
        yield from sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level BPE: itself where it is printable, else one after U+00FF.

    As GPT-2's encoder has it.
    """
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printed else chr(next(others)) for byte in range(256)]


def _is_kimis(settings: dict[str, Any]) -> bool:
    code = settings.get("auto_map")
    named = code.get("AutoTokenizer") if isinstance(code, dict) else None
    names = named if isinstance(named, list) else [named]
    return settings.get("tokenizer_class") == "TikTokenTokenizer" and any(
        isinstance(name, str) and "tokenization_kimi." in name for name in names
    )


def _special(folder: Path, settings: dict[str, Any], first: int) -> Iterator[dict[str, Any]]:
    """The tokens after the ranks: those that have a name, and those that are reserved.

    Raises:
        CheckpointError: one is malformed, or no such id.
    """
    named = settings.get("added_tokens_decoder", {})
    texts: dict[int, str] = {}
    for number, token in named.items() if isinstance(named, dict) else [("", None)]:
        text = token.get("content") if isinstance(token, dict) else None
        if not number.isdecimal() or not isinstance(text, str) or not first <= int(number) < first + RESERVED:
            raise CheckpointError(
                f"{folder / 'tokenizer_config.json'}: added_tokens_decoder: {number!r} is no special token's id.",
                hint=_HINT,
            )
        texts[int(number)] = text
    for number in range(first, first + RESERVED):
        text = texts.get(number, f"<|reserved_token_{number}|>")
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        yield {"id": number, "content": text, **flags, "special": True}
