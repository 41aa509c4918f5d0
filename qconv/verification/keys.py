"""A GGUF file's key/values against those that its source gives."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from gguf import GGUFValue, GGUFValueType, Keys, LlamaFileType

from qconv.artifacts.reported import with_reported_rope
from qconv.artifacts.source import Source
from qconv.boundary.printable import name_of
from qconv.errors import UsageError
from qconv.formats.gguf.header import Value
from qconv.formats.gguf.metadata import Metadata, model_metadata
from qconv.formats.gguf.names import architecture_name
from qconv.formats.gguf.reader import GgufModel
from qconv.formats.gguf.tokenizer import tokenizer_metadata
from qconv.verification.outcome import Verification

_OF_THE_FILE = (Keys.General.NAME, Keys.General.FILE_TYPE, Keys.General.QUANTIZATION_VERSION)
"""What says something of the file, not of the source."""
_DEFAULTS = {Keys.LLM.VOCAB_SIZE: None, Keys.Attention.VALUE_LENGTH: None, Keys.General.TYPE: None}
"""Keys that other writers leave out, and of which llama.cpp takes the same value from elsewhere."""
_OF_TASTE = (Keys.Tokenizer.TOKEN_TYPE, Keys.Tokenizer.BOS_ID, Keys.Tokenizer.EOS_ID, Keys.Tokenizer.PAD_ID)
"""Keys in which sound writers differ."""
_SHOWN = 60


def check_keys(made: GgufModel, is_ours: bool, source: Source, result: Verification) -> None:
    """Keys that decide what a reader computes, or how it tokenizes, against what the source gives.

    Args:
        made: The file.
        is_ours: Whether qconv made it, which writes all keys and no other.
        source: The source.
        result: Gets what was found.
    """
    model, config = source.architecture, source.checkpoint.config
    if is_ours:
        config = with_reported_rope(config, made.files[0].parent)
    expected: Metadata = model_metadata(config, model, "", LlamaFileType.ALL_F32)
    try:
        expected |= tokenizer_metadata(source.checkpoint.path, model.embedding.out_features, config)
    except UsageError as error:
        result.notices.append(f"the tokenizer was not compared: {error.message}")
    problems: list[str] = []
    notices: list[str] = []
    for key, value in expected.items():
        if key in _OF_THE_FILE:
            continue
        if key not in made.metadata:
            decides = is_ours or not _may_lack(key, value, expected)
            (problems if decides else notices).append(f"{key} is missing; the source gives {_shown(value.value)}")
        elif not _equal(value, made.metadata[key]):
            lenient = not is_ours and key in _OF_TASTE
            said = f"{key} is {_shown(made.metadata[key])}, {_shown(value.value)} in the source"
            (notices if lenient else problems).append(said)
    for key in _others(made.metadata, expected, architecture_name(model.family)):
        said = f"{name_of(key)} is {_shown(made.metadata[key])}, of which the source says nothing"
        (problems if is_ours else notices).append(said)
    result.problems += problems
    result.notices += notices
    result.checked.append(f"{len(expected)} keys against the source")


def _others(found: Mapping[str, Value], expected: Metadata, architecture: str) -> Iterator[str]:
    """Keys of the model and its tokenizer that the source does not give."""
    for key in found:
        if key not in expected and key.startswith((f"{architecture}.", "tokenizer.")):
            yield key


def _may_lack(key: str, value: GGUFValue, expected: Metadata) -> bool:
    """Whether a file without a key is read as one with it."""
    name = key.partition(".")[2]
    if any(key == one or name == one.partition(".")[2] for one in _DEFAULTS):
        return True
    if key.startswith(("tokenizer.", "general.")):
        return key not in (Keys.Tokenizer.LIST, Keys.Tokenizer.MERGES, Keys.Tokenizer.PRE, Keys.Tokenizer.MODEL)
    usual = {"rope.freq_base": 10000.0, "rope.dimension_count": None}
    if name in usual:
        return usual[name] is None or value.value == usual[name]
    return name in ("attention.key_length", "attention.head_count_kv") and _is_usual(name, value, expected)


def _is_usual(name: str, value: GGUFValue, expected: Metadata) -> bool:
    """Whether heads are as llama.cpp takes them to be where a file says nothing."""
    sizes = {key.partition(".")[2]: one.value for key, one in expected.items()}
    heads = sizes["attention.head_count"]
    return bool(value.value == (heads if name.endswith("_kv") else sizes["embedding_length"] // heads))


def _equal(expected: GGUFValue, found: Value) -> bool:
    value = expected.value
    if isinstance(found, np.ndarray):
        return isinstance(value, list | tuple) and found.tolist() == [int(one) for one in value]
    if isinstance(found, list):
        return isinstance(value, list | tuple) and list(found) == list(value)
    if expected.type is GGUFValueType.FLOAT32:
        return isinstance(found, int | float) and bool(np.float32(value) == np.float32(found))
    return isinstance(found, bool) == isinstance(value, bool) and bool(found == value)


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return name_of(repr(value), _SHOWN)
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return f"{len(value)} values" if hasattr(value, "__len__") else name_of(repr(value), _SHOWN)
