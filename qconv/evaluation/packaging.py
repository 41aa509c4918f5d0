"""What lies around a build's weights and decides what agents get: chat template, sampling, special tokens, rope.

No weight is read. Templates are compared by what they make of a fixed set of chats and by their text; a build that
differs from its source in any of it is another model to whoever talks to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import Keys

from qconv.artifacts.reported import with_reported_rope
from qconv.boundary.content import is_gguf
from qconv.boundary.printable import name_of
from qconv.boundary.reading import read_json
from qconv.chat.files import DEFAULT
from qconv.chat.fixed_set import FIXED_SET, Chat
from qconv.chat.templates import ChatTemplates, RefusedChatError
from qconv.checkpoint.config import language_part
from qconv.checkpoint.generation_config import GENERATION_CONFIG, read_generation_config
from qconv.checkpoint.rope import stated_rope
from qconv.checkpoint.tokenizer import load_tokenizer
from qconv.errors import CheckpointError
from qconv.formats.gguf.config import config_of
from qconv.formats.gguf.reader import GgufModel
from qconv.formats.gguf.sampling import generation_of, sampling_metadata
from qconv.formats.gguf.special import end_ids
from qconv.runtime.gguf_tokenizer import gguf_tokenizer

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_SPECIAL_OF_GGUF = ("bos_token", "eos_token", "pad_token")
_NOT_COMPARED = ("transformers_version", "_from_model_config")
"""Of generation_config.json: what says nothing about sampling."""
_ROPE_OF_GGUF = ("rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings")
_TYPES_OF_GGUF = ("default", "linear", "yarn")
"""The types that GGUF has keys for; llama3 and longrope are tensors there, which ``verify`` compares."""
_AROUND = 24
"""Characters of two renderings that are shown from where they part."""


@dataclass(slots=True)
class Comparison:
    """What was compared of two models' packaging.

    Attributes:
        rendered: Names of chats that both templates render, and alike.
        refused: Names of chats that both templates refuse.
        checked: What is the same, one sentence each.
        differences: What is not, one sentence each.
    """

    rendered: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    def take(self, what: str, found: Iterator[str]) -> None:
        """Keep differences, or that there are none."""
        differences = list(found)
        self.differences += differences
        self.checked += [] if differences else [what]


@dataclass(frozen=True, slots=True)
class _Packaging:
    """A model without its weights; ``generation`` is what its file or keys say, ``ends`` ids that end an answer."""

    where: str
    is_gguf: bool
    tokenizer: Any
    generation: Mapping[str, Any]
    sampling: Mapping[str, Any]
    ends: tuple[int, ...]
    rope: Mapping[str, Any]
    context: Any
    is_extended: bool
    """Whether the rope is not the model's own but what a build's recipe asked for."""

    def templates(self) -> dict[str, str]:
        """By name; empty for none."""
        found = getattr(self.tokenizer, "chat_template", None)
        return dict(found) if isinstance(found, Mapping) else {DEFAULT: found} if found else {}


def compare_packaging(build: Path, source: Path) -> Comparison:
    """Chat templates, generation_config, special tokens and rope of a build against its source's.

    Args:
        build: A folder with config.json, or a GGUF file or folder, of which what the file itself holds counts.
        source: What it was made of, of either kind.

    Raises:
        CheckpointError: one of them is damaged or has no tokenizer; the source's template cannot be compiled.
    """
    ours, theirs = _packaging(build), _packaging(source, build.parent if build.is_file() else build)
    result = Comparison()
    result.take("the chat templates' text", _texts(ours, theirs))
    _renderings(ours, theirs, result)
    result.take("how the model wants to be sampled, and what ends an answer", _generation(ours, theirs))
    result.take("special tokens", _special_tokens(ours, theirs))
    result.take("rope and context length", _rope(ours, theirs))
    return result


def rope_differences(build: Path, source: Path) -> list[str]:
    """What differs of rope and context length, one sentence each; as :func:`compare_packaging` has it."""
    folder = build.parent if build.is_file() else build
    return list(_rope(_packaging(build), _packaging(source, folder)))


def _packaging(path: Path, build: Path | None = None) -> _Packaging:
    """A model's packaging; of a source, with the rope that the report of ``build`` says was asked for."""
    if is_gguf(path):
        model = GgufModel.open(path)
        config = config_of(model)
        tokens = model.metadata.get(Keys.Tokenizer.LIST)
        generation = generation_of(model.metadata)
        ends = end_ids(model, len(tokens) if isinstance(tokens, list) else 0)
        tokenizer, sampling, where = gguf_tokenizer(model), generation, model.files[0].name
    else:
        config = language_part(read_json(path / "config.json", CheckpointError))
        generation = read_generation_config(path)
        stated = sampling_metadata(path / GENERATION_CONFIG, generation)
        sampling = generation_of({key: one.value for key, one in stated.items()})
        named = generation.get("eos_token_id", config.get("eos_token_id"))
        ends = named if isinstance(named, list) else [] if named is None else [named]
        tokenizer, where = load_tokenizer(path), path.name
    expected = config if build is None else with_reported_rope(config, build)
    return _Packaging(
        where=where,
        is_gguf=is_gguf(path),
        tokenizer=tokenizer,
        generation=generation,
        sampling=sampling,
        ends=tuple(ends),
        rope=stated_rope(expected),
        context=expected.get("max_position_embeddings"),
        is_extended=expected != config,
    )


def _texts(ours: _Packaging, theirs: _Packaging) -> Iterator[str]:
    mine, other = ours.templates(), theirs.templates()
    for name in sorted({*mine, *other}):
        what = f"chat template {name_of(name)}"
        if name not in mine:
            yield f"{what} is missing; the source has it"
        elif name not in other:
            yield f"{what} is there; the source has none"
        elif mine[name].strip() != other[name].strip():
            yield f"{what} is not the source's text"


def _renderings(ours: _Packaging, theirs: _Packaging, result: Comparison) -> None:
    names = sorted({*ours.templates()} & {*theirs.templates()})
    with ChatTemplates(ours.tokenizer, ours.where) as mine, ChatTemplates(theirs.tokenizer, theirs.where) as other:
        for name in names:
            for chat in FIXED_SET:
                label = chat.name if name == DEFAULT else f"{chat.name}, by {name}"
                expected = _rendered(other, chat, name)
                try:
                    found = _rendered(mine, chat, name)
                except CheckpointError as error:
                    result.differences.append(error.message)
                    break
                if found != expected:
                    result.differences.append(f"chat {label!r}: {_parting(found, expected)}")
                elif found is None:
                    result.refused.append(label)
                else:
                    result.rendered.append(label)


def _rendered(chats: ChatTemplates, chat: Chat, name: str) -> str | None:
    """The text, None if the template refuses the chat.

    Raises:
        CheckpointError: the template is none, or takes too much time or memory.
    """
    try:
        return chats.render(chat.messages, answer=chat.answer, name=name, tools=chat.tools, variables=chat.variables)
    except RefusedChatError:
        return None


def _parting(found: str | None, expected: str | None) -> str:
    """Where two renderings part, in words."""
    if found is None:
        return "the build's template refuses it; the source's renders it"
    if expected is None:
        return "the build's template renders it; the source's refuses it"
    pairs = enumerate(zip(found, expected, strict=False))
    at = next((place for place, (one, other) in pairs if one != other), min(len(found), len(expected)))
    one, other = (ascii(text[at : at + _AROUND]) for text in (found, expected))
    return f"rendered otherwise from character {at}: {one}; the source's {other}"


def _generation(ours: _Packaging, theirs: _Packaging) -> Iterator[str]:
    by_keys = ours.is_gguf or theirs.is_gguf
    mine, other = (one.sampling if by_keys else one.generation for one in (ours, theirs))
    if other and not mine:
        missing = "general.sampling.*" if ours.is_gguf else GENERATION_CONFIG
        yield f"{missing} is missing; the source says {', '.join(sorted(other))}"
    else:
        yield from _unequal("generation_config", mine, other, sorted({*mine, *other} - {*_NOT_COMPARED}))
    lost = [end for end in theirs.ends if end not in ours.ends]
    if lost and (by_keys or not (other and not mine)):
        yield f"tokens {', '.join(map(str, lost))} end the source's answers and not the build's"


def _special_tokens(ours: _Packaging, theirs: _Packaging) -> Iterator[str]:
    mine, other = ({**one.tokenizer.special_tokens_map} for one in (ours, theirs))
    by_keys = ours.is_gguf or theirs.is_gguf
    # A GGUF file may name more: llama.cpp needs an id where transformers does without.
    names = [name for name in _SPECIAL_OF_GGUF if name in other] if by_keys else _SPECIAL
    yield from _unequal("special token", mine, other, names)


def _rope(ours: _Packaging, theirs: _Packaging) -> Iterator[str]:
    by_keys = ours.is_gguf or theirs.is_gguf
    names = sorted({*ours.rope, *theirs.rope})
    if by_keys:
        known = theirs.rope["rope_type"] in _TYPES_OF_GGUF
        names = [name for name in names if name in _ROPE_OF_GGUF and (known or name == "rope_theta")]
        # What config.json leaves to the family a GGUF file states.
        left_open = ("rope_theta", "partial_rotary_factor")
        names = [name for name in names if name not in left_open or (name in ours.rope and name in theirs.rope)]
    said = ", set on request" if theirs.is_extended else ""
    yield from (f"{one}{said}" for one in _unequal("rope", ours.rope, theirs.rope, names))
    if ours.context != theirs.context:
        yield f"context length is {ours.context}; the source's is {theirs.context}{said}"


def _unequal(what: str, mine: Mapping[str, Any], other: Mapping[str, Any], names: Any) -> Iterator[str]:
    for name in names:
        one, two = mine.get(name), other.get(name)
        if not _alike(one, two):
            yield f"{what}: {name_of(name)} is {_shown(one)}; the source's is {_shown(two)}"


def _alike(one: Any, other: Any) -> bool:
    """Equality; numbers as far as float32, which GGUF holds them in, tells them apart."""
    both = (one, other)
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in both):
        return math.isclose(one, other, rel_tol=1e-6)
    return type(one) is type(other) and bool(one == other)


def _shown(value: Any) -> str:
    return "none" if value is None else name_of(repr(value), 60)
