"""How tokens are chosen, as records say it. Nothing is imported here: an engine's process may have little else."""

from __future__ import annotations

from typing import TypeAlias

Setting: TypeAlias = str | int | float | list[str] | None


def decoding_settings(
    max_tokens: int, temperature: float, *, seed: int, top_p: float = 1.0, stop: tuple[str, ...] = ()
) -> dict[str, Setting]:
    """Everything that decides which token comes next, also what qconv never applies.

    A model's generation_config.json recommends some of these. None of it is taken: greedy is greedy, so that two
    builds, or two engines, can be compared.
    """
    sampled = temperature > 0.0
    return {
        "decoding": "sampling" if sampled else "greedy",
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p if sampled else 1.0,
        "top_k": None,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "num_beams": 1,
        "stop": list(stop),
        "seed": seed,
    }
