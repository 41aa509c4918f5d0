"""Text from a loaded model: a batch of prompts, greedy or sampled, told as it comes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qconv.boundary.printable import well_formed
from qconv.errors import UsageError

_CHOOSING = frozenset(
    {"do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
    | {"repetition_penalty", "no_repeat_ngram_size", "num_beams", "length_penalty", "diversity_penalty"}
    | {"penalty_alpha", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias", "guidance_scale"}
    | {"forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "min_length", "min_new_tokens"}
)
"""Keys of a generation config that change which token comes next."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model made of a prompt.

    Attributes:
        prompt: The prompt as the model saw it, chat template included.
        text: What follows it, without special tokens.
        tokens: How many tokens that is, the end-of-sequence token included.
        stopped: Whether the model ended it (``end``) or the limit did (``length``).
    """

    prompt: str
    text: str
    tokens: int
    stopped: Literal["end", "length"]


def recommended(model: Any) -> dict[str, Any]:
    """What the model's generation config says of how tokens should be chosen; :func:`complete` does none of it."""
    stated = model.generation_config.to_diff_dict()
    return {key: value for key, value in sorted(stated.items()) if key in _CHOOSING}


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    special_tokens: bool = True,
    listener: Callable[[str], None] | None = None,
) -> list[Completion]:
    """Continue prompts, all in one batch, with a key-value cache.

    Of the model's generation config only the end tokens count: at temperature 0 the likeliest token comes next, without
    penalties and beams, above it one drawn from the whole distribution.

    Args:
        model: What :func:`qconv.runtime.loading.load` gave.
        tokenizer: Its tokenizer.
        prompts: At least one.
        max_tokens: The most tokens that are added to each.
        temperature: 0 for the likeliest token each time.
        seed: Of the samples.
        special_tokens: Whether the tokenizer adds its own around a prompt; a chat template has them already.
        listener: Told each piece of text as soon as it is complete; for a single prompt only.

    Raises:
        UsageError: no prompt, an empty one, or one that is too long for the model.
    """
    for number, prompt in enumerate(prompts, start=1):
        if prompt != well_formed(prompt):
            raise UsageError(f"prompt {number} holds half of a surrogate pair, which is no text.")
    ids = [tokenizer(prompt, add_special_tokens=special_tokens).input_ids for prompt in prompts]
    _check(ids, model.config.max_position_embeddings - max_tokens)
    longest = max(map(len, ids))
    pad, ends = _special_ids(model, tokenizer)
    # Padded at the left, so that every sequence goes on at the same place.
    batch = torch.tensor([[pad] * (longest - len(one)) + one for one in ids], device=model.device)
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in ids], device=model.device)
    torch.manual_seed(seed)
    with torch.no_grad(), _nothing_inherited(model):
        output: Tensor = model.generate(
            batch,
            attention_mask=mask,
            generation_config=_settings(max_tokens, temperature, pad, ends),
            streamer=None if listener is None else _streamer(tokenizer, listener),
        )
    answers = output[:, longest:].tolist()
    return [_completion(tokenizer, prompt, answer, ends) for prompt, answer in zip(prompts, answers, strict=True)]


@contextlib.contextmanager
def _nothing_inherited(model: Any) -> Iterator[None]:
    """Hide the model's generation config, from which generate() takes whatever it is not told."""
    from transformers import GenerationConfig

    untyped: Any = GenerationConfig
    stated, model.generation_config = model.generation_config, untyped()
    try:
        yield
    finally:
        model.generation_config = stated


def _check(ids: Sequence[Sequence[int]], room: int) -> None:
    if not ids:
        raise UsageError("no prompt.")
    for number, one in enumerate(ids, start=1):
        if not one:
            raise UsageError(f"prompt {number} is empty.", hint="Give some text.")
        if len(one) > room:
            raise UsageError(
                f"prompt {number} has {len(one)} tokens; the model has room for {max(room, 0)} before the answer.",
                hint="Shorten it, or ask for fewer tokens.",
            )


def _special_ids(model: Any, tokenizer: Any) -> tuple[int, list[int]]:
    """The padding token and those that end a sequence."""
    stated = model.generation_config.eos_token_id
    ends = [] if stated is None else [stated] if isinstance(stated, int) else list(stated)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    pad = tokenizer.pad_token_id
    return (pad if pad is not None else ends[0] if ends else 0), ends


def _settings(max_tokens: int, temperature: float, pad: int, ends: list[int]) -> Any:
    from transformers import GenerationConfig

    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    options: dict[str, Any] = {"max_new_tokens": max_tokens, "pad_token_id": pad, "eos_token_id": ends or None}
    untyped: Any = GenerationConfig
    return untyped(**options, **sampling)


def _streamer(tokenizer: Any, listener: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            listener(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _completion(tokenizer: Any, prompt: str, answer: list[int], ends: list[int]) -> Completion:
    end = next((place for place, token in enumerate(answer) if token in ends), None)
    kept = answer if end is None else answer[: end + 1]
    text: str = tokenizer.decode(kept, skip_special_tokens=True)
    return Completion(prompt, text, len(kept), "length" if end is None else "end")
