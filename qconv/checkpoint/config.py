"""config.json as a model's description reads it: typed, bounded, and with errors that name the key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qconv.boundary.printable import name_of
from qconv.errors import CheckpointError

MAX_SIZE = 2**31 - 1
"""The largest number that a config.json may give for a size. Engines count most of them in 32 bits."""
MAX_LAYERS = 10_000
MAX_HEAD_DIM = 65_536
MAX_WIDTH = 2**20
"""Of what a layer computes, where transformers' model of it is run: forty times the widest MLP there is."""
MAX_EXPERTS = 250_000
"""Of all layers together: ten times what a model of a trillion weights has. A description takes memory for each."""
QUANTIZATION = "quantization_config"
"""The key under which a config.json says how weights are stored."""
_MAX_NUMBER = 1e300


def language_part(values: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes the language model: itself, or its ``text_config``."""
    text = values.get("text_config")
    return dict(text if isinstance(text, Mapping) and "model_type" in text else values)


@dataclass(frozen=True, slots=True)
class Config:
    """Typed access to a config.json, with errors that name the key."""

    values: dict[str, Any]

    def integer(self, *keys: str, default: int | None = None, most: int = MAX_SIZE) -> int:
        """The first of ``keys`` that is present, as a positive int; ``default`` if none is.

        Raises:
            CheckpointError: absent without default, not a positive int, or more than ``most``.
        """
        for key in keys:
            value = self.values.get(key)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CheckpointError(
                    f"config.json: {key} is {_shown(value)}, not a positive integer.", hint="Repair config.json."
                )
            if value > most:
                raise CheckpointError(
                    f"config.json: {key} {_shown(value)} is not plausible; at most {most:,} are read.",
                    hint="Repair config.json.",
                )
            return value
        if default is None:
            raise CheckpointError(f"config.json lacks {' or '.join(keys)}.", hint="Repair config.json.")
        return default

    def positive(self, key: str) -> float | None:
        """The number ``key``; None if absent or null.

        Raises:
            CheckpointError: not a finite number above zero.
        """
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < _MAX_NUMBER:
            raise CheckpointError(
                f"config.json: {key} is {_shown(value)}, not a positive number.", hint="Repair config.json."
            )
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """The boolean ``key``.

        Raises:
            CheckpointError: not a boolean.
        """
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(
                f"config.json: {key} is {_shown(value)}, not true or false.", hint="Repair config.json."
            )
        return value

    def integers(self, key: str) -> list[int]:
        """The list of ints ``key``, of layers; empty if absent or null.

        Raises:
            CheckpointError: not a list of ints, or of more than layers there can be.
        """
        value = self.values.get(key) or []
        if not isinstance(value, list) or len(value) > MAX_LAYERS or not all(isinstance(item, int) for item in value):
            raise CheckpointError(
                f"config.json: {key} is {_shown(value)}, not a list of integers.", hint="Repair config.json."
            )
        return value


def _shown(value: Any) -> str:
    """A value from config.json, cut where it is long. A number may have more digits than Python prints."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    return name_of(repr(value), 80)


def quantization_of(config: Mapping[str, Any]) -> Any:
    """What a config.json says of quantization, for the whole model or for its language model; None if nothing."""
    text = config.get("text_config")
    section = config.get(QUANTIZATION)
    return text.get(QUANTIZATION) if section is None and isinstance(text, Mapping) else section


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that says nothing of quantization."""
    kept = {key: value for key, value in config.items() if key != QUANTIZATION}
    text = kept.get("text_config")
    if isinstance(text, Mapping) and QUANTIZATION in text:
        kept["text_config"] = {key: value for key, value in text.items() if key != QUANTIZATION}
    return kept
