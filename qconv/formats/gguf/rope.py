"""Rotary embeddings as a config.json states them, in llama.cpp's terms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from qconv.checkpoint.config import language_part
from qconv.checkpoint.rope import stated_rope
from qconv.errors import CheckpointError, UsageError
from qconv.formats.gguf.forms import Form, form


@dataclass(frozen=True, slots=True)
class Rope:
    """Frequencies are ``theta ** (-2i / rotated)``, then scaled by ``kind``.

    Attributes:
        theta: The base.
        kind: ``default``, ``linear``, ``yarn`` or ``llama3``.
        parameters: The numbers of the scaling, as config.json names them.
        share: How much of a head is rotated.
        mscale: YaRN's ``mscale_all_dim`` where attention is scaled by it; 0 where it is not.
    """

    theta: float
    kind: str
    parameters: dict[str, float]
    share: float = 1.0
    mscale: float = 0.0

    def rotated(self, head_dim: int) -> int:
        """How many of a head's channels are rotated, its first."""
        return int(head_dim * self.share)

    def factors(self, head_dim: int) -> tuple[float, ...]:
        """What each of the ``head_dim / 2`` frequencies is divided by; empty unless ``llama3``.

        Long wavelengths are stretched by ``factor``, short ones are left alone, and those between
        ``original / high_freq_factor`` and ``original / low_freq_factor`` are interpolated (Llama 3.1's rule).
        """
        if self.kind != "llama3":
            return ()
        values = self.parameters
        original, factor = values["original_max_position_embeddings"], values["factor"]
        low, high = values["low_freq_factor"], values["high_freq_factor"]
        factors = []
        for index in range(head_dim // 2):
            wavelength = 2.0 * math.pi * self.theta ** (2.0 * index / head_dim)
            turns = original / wavelength
            # Llama 4's bounds are one: nothing is between.
            kept = min(max((turns - low) / (high - low), 0.0), 1.0) if high != low else float(turns > high)
            factors.append(1.0 / ((1.0 - kept) / factor + kept))
        return tuple(factors)


_SHARE = "partial_rotary_factor"
_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
_YARN_BOUNDARIES = {"beta_fast": 32.0, "beta_slow": 1.0}
"""The turns between which YaRN interpolates. llama.cpp has keys for others, but loads them and computes differently."""


UNTRUNCATED = "YaRN without truncation: llama.cpp rounds the bounds of what it interpolates to whole channels"


def rope_of(config: dict[str, Any]) -> Rope:
    """The rotary embedding of a config.json.

    Raises:
        CheckpointError: the base or a number of the scaling is missing or is no positive number.
        UsageError: the family has no GGUF form; a scaling that llama.cpp does not compute as transformers does, or two
            that contradict each other.
    """
    config = language_part(config)
    of = form(str(config.get("model_type")))
    stated = stated_rope(config)
    theta = stated.get("rope_theta", of.theta)
    kind = stated["rope_type"]
    if kind == "dynamic" and of.alpha and stated.get("alpha") is not None:
        head_dim = _positive("head_dim", config.get("head_dim"))
        theta = _positive("rope_theta", theta) * _positive("alpha", stated["alpha"]) ** (head_dim / (head_dim - 2.0))
        kind = "default"
    if kind not in _REQUIRED:
        raise UsageError(
            f"config.json: rope scaling {kind!r} cannot be expressed in a GGUF file of this architecture.",
            hint=f"llama.cpp computes {', '.join(_REQUIRED)}.",
        )
    parameters = {name: _positive(name, stated.get(name)) for name in _REQUIRED[kind]}
    share = 1.0 if of.rotated is None else stated.get(_SHARE, of.rotated(config))
    mscale = float(stated.get("mscale_all_dim") or 0.0) if of.mixing.mscale and kind == "yarn" else 0.0
    rope = Rope(_positive("rope_theta", theta), kind, parameters, _positive(_SHARE, share), mscale)
    _check_expressible(stated, rope, of)
    return rope


def _check_expressible(stated: dict[str, Any], rope: Rope, of: Form) -> None:
    partial = stated.get(_SHARE)
    reason = None
    if of.rotated is None and partial not in (None, 1):
        reason = f"{_SHARE} {partial!r}: llama.cpp rotates whole heads of this architecture"
    elif rope.kind == "llama3" and not of.rope_factors:
        reason = f"rope_type 'llama3': the tensor of its factors is not read in llama.cpp's {of.architecture}"
    elif rope.kind == "yarn":
        reason = _yarn_difference(stated, rope.parameters["factor"], of)
    if reason is not None:
        hint = "This model cannot be written as GGUF."
        if reason == UNTRUNCATED:
            hint = "Set truncate to true in config.json for what llama.cpp computes of every file of this model."
        raise UsageError(f"config.json: {reason}.", hint=hint)


def _yarn_difference(stated: dict[str, Any], factor: float, of: Form) -> str | None:
    """How a YaRN differs from llama.cpp's, which derives the magnitude from the factor; None if it does not."""
    usual = {"attention_factor": 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0, **_YARN_BOUNDARIES}
    if of.mixing.mscale:
        if not stated.get("mscale") or stated.get("mscale") != stated.get("mscale_all_dim"):
            return "YaRN without mscale, or with another mscale_all_dim: llama.cpp scales attention by both alike"
        usual["attention_factor"] = 1.0
    for name, value in usual.items():
        given = stated.get(name)
        if given is not None and not math.isclose(_positive(name, given), value, rel_tol=1e-6):
            return f"YaRN with {name} {given!r}: llama.cpp computes {value:.6g}"
    scaled = not of.mixing.mscale and (stated.get("mscale") or stated.get("mscale_all_dim"))
    if scaled:
        return "YaRN with mscale: llama.cpp has no keys for it in this architecture"
    if stated.get("truncate") is False:
        return UNTRUNCATED
    return None


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < math.inf:
        what = "lacks" if value is None else f"has {value!r} as"
        raise CheckpointError(
            f"config.json {what} {name}, a positive number.",
            hint="Repair config.json: without it the file would load and be silently wrong.",
        )
    return float(value)
