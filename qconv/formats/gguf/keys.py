"""A GGUF file's key/values by type, and what becomes of those that qconv does not compute with.

A key below the architecture's name says something of the computation. qconv uses it, or knows that it says nothing or
what holds anyway, or refuses the file and names it: logits without what a left out key says are wrong, and nobody would
see it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import Keys
from numpy import ndarray

from qconv.errors import CheckpointError
from qconv.formats.gguf.header import Value

MAX_INTEGER = 2**31 - 1
"""llama.cpp holds counts in 32 bits."""
SCALE_LINEAR = "{arch}.rope.scale_linear"
"""What 2023's converters wrote where ``rope.scaling.factor`` is now."""

_SOFTMAX = 1  # of llama.cpp's expert gating functions; 0 is the architecture's own, softmax here
_SAYS_NOTHING = (
    Keys.LLM.VOCAB_SIZE,
    Keys.LLM.TENSOR_DATA_LAYOUT,
    Keys.LLM.EXPERT_FEED_FORWARD_LENGTH,
    Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH,
    Keys.Rope.DIMENSION_SECTIONS,
    Keys.Rope.SCALING_FINETUNED,
    Keys.Rope.SCALING_ORIG_CTX_LEN,
    Keys.Rope.SCALING_TYPE,
)
"""Told by the tensors, of how the file was made, of a scaling that there is not, or of positions of other than text."""
_HOLDS_ANYWAY: Mapping[str, tuple[Any, ...]] = {
    Keys.Attention.CAUSAL: (True,),
    Keys.LLM.EXPERT_SHARED_COUNT: (1,),
    Keys.LLM.EXPERT_GROUP_COUNT: (1,),
    Keys.LLM.EXPERT_GROUP_USED_COUNT: (1,),
    Keys.LLM.EXPERT_WEIGHTS_SCALE: (1,),
    Keys.LLM.EXPERT_GATING_FUNC: (_SOFTMAX,),
    Keys.LLM.MOE_EVERY_N_LAYERS: (1,),
    Keys.LLM.INTERLEAVE_MOE_LAYER_STEP: (1,),
    Keys.LLM.LOGIT_SCALE: (1,),
    Keys.LLM.RESIDUAL_SCALE: (1,),
    Keys.LLM.EMBEDDING_SCALE: (1,),
    Keys.Attention.OUTPUT_SCALE: (1,),
    Keys.Rope.SCALING_ATTN_FACTOR: (1,),
    Keys.Rope.SCALING_YARN_ATTN_FACTOR: (1,),
    Keys.Rope.SCALING_YARN_EXT_FACTOR: (-1, 1),
    Keys.Rope.SCALING_YARN_BETA_FAST: (32,),
    Keys.Rope.SCALING_YARN_BETA_SLOW: (1,),
}
"""Values with which a key changes nothing, besides 0 and empty, which say so of every key, and false of every other."""


@dataclass(frozen=True, slots=True)
class ModelKeys:
    """The key/values of a model; a name such as :data:`gguf.Keys.LLM.BLOCK_COUNT` is completed with its architecture.

    Attributes:
        path: The file that holds them.
        metadata: All of them.
        architecture: What the file calls it.
        used: The keys that were asked for.
    """

    path: Path
    metadata: Mapping[str, Value]
    architecture: str
    used: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, path: Path, metadata: Mapping[str, Value]) -> ModelKeys:
        """Of a file.

        Raises:
            CheckpointError: it names no architecture.
        """
        name = metadata.get(Keys.General.ARCHITECTURE)
        if not isinstance(name, str) or not name:
            raise CheckpointError(
                f"{path}: {Keys.General.ARCHITECTURE} is {name!r}: the file names no architecture.",
                hint="It is damaged, or holds no model.",
            )
        return cls(path, metadata, name)

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive whole number below 2^31, or one for each layer, all the same; 0 too where that is the default.

        Raises:
            CheckpointError: it is absent without a default, or something else.
        """
        value = self._value(key, default)
        if isinstance(value, ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()
        least = 0 if default == 0 else 1
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_INTEGER:
            raise self.error(f"{self._full(key)} is {_shown(value)}, not a positive whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number.

        Raises:
            CheckpointError: as :meth:`integer`.
        """
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < math.inf:
            raise self.error(f"{self._full(key)} is {_shown(value)}, not a positive number")
        return float(value)

    def amount(self, key: str) -> float:
        """A number that is not negative.

        Raises:
            CheckpointError: as :meth:`integer`.
        """
        value = self._value(key, None)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < math.inf:
            raise self.error(f"{self._full(key)} is {_shown(value)}, not a number from 0")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false.

        Raises:
            CheckpointError: it is something else.
        """
        value = self._value(key, None)
        if not isinstance(value, bool):
            raise self.error(f"{self._full(key)} is {_shown(value)}, not true or false")
        return value

    def flags(self, key: str, count: int) -> list[bool]:
        """True or false for each of ``count`` layers.

        Raises:
            CheckpointError: it is absent or something else.
        """
        value = self._value(key, None)
        given = value.tolist() if isinstance(value, ndarray) else value
        if not isinstance(given, list) or len(given) < count or any(one not in (0, 1) for one in given):
            raise self.error(f"{self._full(key)} is {_shown(value)}, not true or false for each of {count} layers")
        return [bool(one) for one in given[:count]]

    def text(self, key: str, default: str) -> str:
        """A text.

        Raises:
            CheckpointError: it is something else.
        """
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.error(f"{self._full(key)} is {_shown(value)}, not a text")
        return value

    def has(self, key: str) -> bool:
        """Whether it is there."""
        return self._full(key) in self.metadata

    def require_rest_to_say_nothing(self) -> None:
        """Check that no key of the architecture that was not asked for changes the computation.

        Raises:
            CheckpointError: one does, or may; it is named.
        """
        silent = {self._full(key) for key in _SAYS_NOTHING} | self.used
        neutral = {self._full(key): values for key, values in _HOLDS_ANYWAY.items()}
        for key, value in self.metadata.items():
            if not key.startswith(f"{self.architecture}.") or key in silent:
                continue
            says_nothing = _is_nothing(value) and not (value is False and key in neutral)
            if not says_nothing and not _is_one_of(value, neutral.get(key, ())):
                raise CheckpointError(
                    f"{self.path}: {key} is {_shown(value)}, with which qconv does not compute.",
                    hint="llama.cpp may. qconv runs no model in part: its logits would be others.",
                )

    def error(self, what: str) -> CheckpointError:
        """An error about this file."""
        return CheckpointError(f"{self.path}: {what}.", hint="The file is damaged, or of another kind.")

    def _value(self, key: str, default: Value | None) -> Value | None:
        self.used.add(self._full(key))
        return self.metadata.get(self._full(key), default)

    def _full(self, key: str) -> str:
        return key.format(arch=self.architecture)


def _is_nothing(value: Value) -> bool:
    if isinstance(value, ndarray):
        return not value.any()
    return not value


def _is_one_of(value: Value, values: tuple[Any, ...]) -> bool:
    return isinstance(value, int | float) and any(value == one for one in values)


def _shown(value: Any) -> str:
    """A value as a message shows it; a list may have a million."""
    if isinstance(value, list | ndarray):
        return f"a list of {len(value)}"
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
