"""The key/values of a GGUF file that describe the tokenizer, from tokenizer.json or Kimi's ranks and the files beside.

llama.cpp tokenizes by itself: byte-level BPE with one of its own pre-tokenizers, named by ``tokenizer.ggml.pre``, or
SentencePiece's BPE (:mod:`qconv.formats.gguf.sentencepiece`). It does not normalize, so text that is not in NFC
tokenizes differently from transformers where a tokenizer asks for NFC, as Qwen's does. Whatever else it cannot follow
is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from qconv.boundary.printable import name_of
from qconv.chat.files import templates_of
from qconv.checkpoint.generation_config import GENERATION_CONFIG, read_generation_config
from qconv.checkpoint.reader import read_json
from qconv.checkpoint.tiktoken import RANKS_NAME, has_ranks
from qconv.checkpoint.tiktoken import described as ranks_described
from qconv.errors import CheckpointError, UsageError
from qconv.formats.gguf.metadata import Metadata
from qconv.formats.gguf.pre_tokenizers import GPT2, name_of_kind, written_names
from qconv.formats.gguf.sampling import sampling_metadata
from qconv.formats.gguf.sentencepiece import read_sentencepiece
from qconv.formats.gguf.special import END_OF_MESSAGE, END_TEXTS
from qconv.formats.gguf.vocabulary import (
    REDOWNLOAD,
    Vocabulary,
    read_merges,
    read_tokens,
    require_tokens,
    shown,
    unsupported,
)

_UNSUPPORTED_BPE = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")


def tokenizer_metadata(folder: Path, rows: int, config: dict[str, Any]) -> Metadata:
    """The ``tokenizer.*`` keys, and those about sampling.

    Args:
        folder: Where tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json lie.
        rows: Rows of the embedding; a vocabulary that is smaller is padded with ``[PAD<id>]``.
        config: config.json.

    Raises:
        CheckpointError: a file is missing or malformed, or two tokens have the same id or the same text.
        UsageError: a tokenizer that llama.cpp cannot follow; says why.
    """
    path = folder / "tokenizer.json"
    if has_ranks(folder):
        path, described = folder / RANKS_NAME, ranks_described(folder)
    elif path.is_file():
        described = read_json(path)
    else:
        raise UsageError(
            f"{path}: no such file: qconv reads no other form of a tokenizer.",
            hint="Save the tokenizer with transformers' save_pretrained, which writes it.",
        )
    vocabulary = read_vocabulary(path, described, rows)
    settings = _optional_json(folder / "tokenizer_config.json")
    generation = read_generation_config(folder)

    writer = GGUFWriter(None, "")
    ids = {
        kind: _special_id(f"{kind}_token", vocabulary, settings, (config, generation))
        for kind in ("bos", "eos", "pad", "unk")
    }
    _add_vocabulary(writer, vocabulary, ids["unk"])
    if ids["eos"] is None:
        raise CheckpointError(
            f"{folder}: no end-of-sequence token: tokenizer_config.json, config.json and generation_config.json name "
            "none.",
            hint="Name it: llama.cpp would take token 11 instead.",
        )
    writer.add_eos_token_id(ids["eos"])
    # A model without one never gets it, as add_bos_token says; but left out, token 11 would pass for it.
    writer.add_bos_token_id(ids["eos"] if ids["bos"] is None else ids["bos"])
    if ids["pad"] is not None:
        writer.add_pad_token_id(ids["pad"])
    _add_ends(writer, path, vocabulary, _ends(folder, config, generation), ids["eos"])
    adds_bos, adds_eos = _adds(path, described, ids)
    writer.add_add_bos_token(adds_bos)
    writer.add_add_eos_token(adds_eos)
    template = chat_template(folder, settings)
    if template:
        writer.add_chat_template(template)
    return writer.kv_data[0] | sampling_metadata(folder / GENERATION_CONFIG, generation)


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary, unknown: int | None) -> None:
    types = list(vocabulary.types)
    writer.add_tokenizer_model("gpt2" if vocabulary.scores is None else "llama")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    if vocabulary.scores is None:
        writer.add_token_types(types)
        writer.add_token_merges(list(vocabulary.merges))
        return
    if unknown is not None:
        types[unknown] = TokenType.UNKNOWN
        writer.add_unk_token_id(unknown)
    writer.add_token_types(types)
    writer.add_token_scores(list(vocabulary.scores))
    writer.add_add_space_prefix(vocabulary.begins_with_space)


def read_vocabulary(path: Path, described: dict[str, Any], rows: int) -> Vocabulary:
    """The vocabulary of a tokenizer.json, padded to ``rows`` tokens.

    Raises:
        CheckpointError: malformed, or two tokens share an id or a text, or more tokens than rows.
        UsageError: llama.cpp has no such tokenizer.
    """
    model = described.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else None
        raise unsupported(path, f"a {name_of(str(kind), 80)} tokenizer, not byte-level BPE")
    if model.get("byte_fallback"):
        return read_sentencepiece(path, described, rows)
    used = [option for option in _UNSUPPORTED_BPE if model.get(option)]
    if used:
        raise unsupported(path, f"BPE with {used[0]} {shown(model[used[0]])}")
    normalizer = described.get("normalizer") or {"type": "NFC"}
    if normalizer != {"type": "NFC"}:
        kind = normalizer.get("type") if isinstance(normalizer, dict) else normalizer
        raise unsupported(path, f"a normalizer of type {name_of(str(kind), 80)}")
    pre = detect_pre_tokenizer(path, described.get("pre_tokenizer"), ignores_merges=bool(model.get("ignore_merges")))
    # The byte-level alphabet writes a space as another letter, so a space within a part means another alphabet.
    pairs = read_merges(path, model.get("merges"))
    tokens, types = read_tokens(path, described, rows)
    require_tokens(path, pairs, tokens)
    return Vocabulary(tokens, types, pre, [" ".join(pair) for pair in pairs])


def detect_pre_tokenizer(path: Path, described: Any, *, ignores_merges: bool) -> str:
    """llama.cpp's name of a tokenizer.json's pre-tokenizer.

    Raises:
        UsageError: none that is known to be the same.
    """
    splits = _splits(described)
    name = None if splits is None else name_of_kind(splits, ignores_merges=ignores_merges)
    if name is not None:
        return name
    other = None if splits is None else name_of_kind(splits, ignores_merges=not ignores_merges)
    if other is not None:
        raise unsupported(path, f"ignore_merges {ignores_merges} with pre-tokenizer {other}")
    raise unsupported(path, f"a pre-tokenizer that is none of {', '.join(written_names())}")


def _splits(described: Any) -> tuple[str, ...] | None:
    """The patterns by which a pre-tokenizer cuts, one after the other, or None where it does something else too."""
    steps = described.get("pretokenizers") if isinstance(described, dict) else None
    *before, last = steps if isinstance(steps, list) and steps else [described]
    patterns = []
    for step in before:
        match step:
            case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
                patterns.append(pattern)
            case {"type": "Digits", "individual_digits": True}:
                patterns.append(r"\p{N}")
            case _:
                return None
    match last:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False} if patterns:
            return tuple(patterns)
        case {"type": "ByteLevel", "add_prefix_space": False, **rest} if rest.get("use_regex", True) is True:
            return (*patterns, GPT2)
    return None


def chat_template(folder: Path, settings: Mapping[str, Any]) -> str | list[Mapping[str, str]] | None:
    """The chat template, or several by name, as gguf's writer takes them.

    Raises:
        CheckpointError: it cannot be read or is malformed.
    """
    found = templates_of(folder, settings)
    if set(found) <= {"default"}:
        return found.get("default")
    return [{"name": name, "template": template} for name, template in found.items()]


def _special_id(
    key: str, vocabulary: Vocabulary, settings: Mapping[str, Any], configs: Sequence[Mapping[str, Any]]
) -> int | None:
    """A special token's id: the tokenizer's own word first, then config.json's, then generation_config.json's."""
    stated = settings.get(key)
    text = stated.get("content") if isinstance(stated, dict) else stated
    if isinstance(text, str):
        number = vocabulary.id_of(text)
        if number is None:
            raise CheckpointError(
                f"tokenizer_config.json: {key} {text!r} is no token of tokenizer.json.", hint=REDOWNLOAD
            )
        return number
    for config in configs:
        value = config.get(f"{key}_id")
        # Several ends of sequence: the first is the tokenizer's, llama.cpp finds the others by their text.
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and not isinstance(value, bool):
            if not 0 <= value < len(vocabulary.tokens):
                raise CheckpointError(
                    f"config.json: {key}_id {value} is no row of the embedding.", hint="Repair config.json."
                )
            return value
    return None


def _ends(folder: Path, config: Mapping[str, Any], generation: Mapping[str, Any]) -> list[int]:
    """The tokens that end an answer in transformers: generation_config.json's, else config.json's.

    Raises:
        CheckpointError: they are no numbers.
    """
    for name, values in ((GENERATION_CONFIG, generation), ("config.json", config)):
        stated = values.get("eos_token_id")
        if stated is None:
            continue
        ends = stated if isinstance(stated, list) else [stated]
        if not all(isinstance(end, int) and not isinstance(end, bool) for end in ends):
            raise CheckpointError(
                f"{folder / name}: eos_token_id is {stated!r}, neither an id nor a list of them.",
                hint=f"Repair {name}.",
            )
        return ends
    return []


def _add_ends(writer: GGUFWriter, path: Path, vocabulary: Vocabulary, ends: Sequence[int], eos: int) -> None:
    """Name the ends besides the end of sequence: llama.cpp has a key for that of a turn and one for that of a message.

    It knows common ones by their text too, so they go last. Ids beyond the vocabulary are no token and never come.

    Raises:
        UsageError: there are more than it has keys for.
    """
    texts = {end: vocabulary.tokens[end] for end in dict.fromkeys(ends) if 0 <= end < len(vocabulary.tokens)}
    message = next((end for end, text in texts.items() if text == END_OF_MESSAGE), None)
    others = [end for end in texts if end not in (eos, message)]
    others.sort(key=lambda end: texts[end] in END_TEXTS)
    if others:
        writer.add_eot_token_id(others[0])
    if message is None and len(others) > 1 and texts[others[1]] not in END_TEXTS:
        message = others.pop(1)
    if message is not None:
        writer.add_eom_token_id(message)
    unknown = [texts[end] for end in others[1:] if texts[end] not in END_TEXTS]
    if unknown:
        raise UsageError(
            f"{path.parent / GENERATION_CONFIG}: {unknown} end an answer, and llama.cpp has no key left to say so.",
            hint="Remove those that the model never writes from eos_token_id.",
        )


def _adds(path: Path, described: dict[str, Any], ids: Mapping[str, int | None]) -> tuple[bool, bool]:
    """Whether bos is put before and eos after a text.

    The post-processor alone decides: transformers 5 loads add_bos_token and add_eos_token of tokenizer_config.json
    without effect.
    """
    before, after = _added_around(path, described)
    for kind, added in (("bos", before), ("eos", after)):
        if added not in ([], [ids[kind]]):
            raise UsageError(
                f"{path}: adds tokens {added} around every text; llama.cpp can add one {kind} token.",
                hint="This tokenizer cannot be written as GGUF.",
            )
    return bool(before), bool(after)


def _added_around(path: Path, described: dict[str, Any]) -> tuple[list[int | None], list[int | None]]:
    """Ids of the tokens that the post-processor puts before and after a text."""
    processor = described.get("post_processor")
    steps = processor.get("processors", [processor]) if isinstance(processor, dict) else []
    before: list[int | None] = []
    after: list[int | None] = []
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                continue
            case {"type": "TemplateProcessing", "single": list(template)}:
                special = step.get("special_tokens") or {}
                target = before
                for piece in template:
                    match piece:
                        case {"Sequence": _}:
                            target = after
                        case {"SpecialToken": {"id": str(name)}}:
                            target.extend((special.get(name) or {}).get("ids") or [None])
                        case _:
                            raise CheckpointError(f"{path}: post-processor piece {piece!r}.", hint=REDOWNLOAD)
            case _:
                kind = step.get("type") if isinstance(step, dict) else step
                raise unsupported(path, f"a post-processor of type {kind}")
    return before, after


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
