"""How a model wants to be sampled: ``general.sampling.*``, which llama.cpp's server takes for its defaults.

llama.cpp's converter writes them from generation_config.json. Without them Qwen3-Coder, say, runs at another
temperature, top_k and penalty than its makers state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFValue, GGUFValueType

from qconv.errors import CheckpointError
from qconv.formats.gguf.header import Value
from qconv.formats.gguf.metadata import Metadata

_PREFIX = "general.sampling."
_KEYS = {
    "top_k": ("top_k", GGUFValueType.INT32),
    "top_p": ("top_p", GGUFValueType.FLOAT32),
    "min_p": ("min_p", GGUFValueType.FLOAT32),
    "temperature": ("temp", GGUFValueType.FLOAT32),
    "repetition_penalty": ("penalty_repeat", GGUFValueType.FLOAT32),
}
"""llama.cpp's name by generation_config.json's."""
_DIGITS = 6
"""Of a float32's value, as people write it."""


def sampling_metadata(path: Path, generation: Mapping[str, Any]) -> Metadata:
    """The keys of a generation_config.json.

    Args:
        path: Where it lies, for messages.
        generation: Its values; a key that is null or absent is left out.

    Raises:
        CheckpointError: a value is no number from 0.
    """
    metadata: Metadata = {}
    for name, (key, kind) in _KEYS.items():
        value = generation.get(name)
        if value is None:
            continue
        whole = kind is GGUFValueType.INT32
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not 0 <= value < 2**31:
            raise CheckpointError(
                f"{path}: {name} is {value!r}, not a {'whole ' if whole else ''}number from 0.",
                hint="Repair generation_config.json.",
            )
        metadata[_PREFIX + key] = GGUFValue(value if whole else float(value), kind)
    return metadata


def generation_of(metadata: Mapping[str, Value]) -> dict[str, Any]:
    """What a file's keys say, by transformers' names; values that cannot be are left out, as llama.cpp does."""
    found: dict[str, Any] = {}
    for name, (key, kind) in _KEYS.items():
        value = metadata.get(_PREFIX + key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            continue
        found[name] = int(value) if kind is GGUFValueType.INT32 else float(f"{value:.{_DIGITS}g}")
    if "temperature" in found:
        found["do_sample"] = found["temperature"] > 0.0
        if not found["do_sample"]:
            del found["temperature"]
    if found.get("repetition_penalty") == 0.0:
        del found["repetition_penalty"]  # none that transformers computes with
    return found
