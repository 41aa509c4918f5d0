"""Completing prompts with a transformers model: batches of fixed rows, a generator of its own for every completion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qconv.boundary.printable import well_formed
from qconv.evaluation.engines.base import Completion, Prompt, Sampling, Step, stop_at


@dataclass(slots=True)
class _Row:
    """One completion at work."""

    prompt: int
    sample: int
    ids: list[int]
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    done: bool = False
    stopped: bool = False

    def completion(self) -> Completion:
        tokens = tuple(self.tokens)
        return Completion(self.prompt, self.sample, self.text, tokens, "stop" if self.stopped else "length")


@dataclass(frozen=True, slots=True)
class Decoder:
    """Decodes ``rows`` completions at once, padded on the left to the longest prompt.

    A completion that has ended keeps its row until all of its batch have: the shape of a batch, and with it every
    rounding, depends on the prompts alone and not on what was generated.
    """

    model: Any
    tokenizer: Any
    rows: int

    @torch.inference_mode()
    def complete(self, prompts: Sequence[Prompt], sampling: Sampling, step: Step) -> Iterator[Completion]:
        """Every sample of every prompt, in order."""
        jobs = [(index, sample) for index in range(len(prompts)) for sample in range(sampling.samples)]
        for start in range(0, len(jobs), self.rows):
            rows = [self._row(index, prompts[index], sample, sampling) for index, sample in jobs[start:][: self.rows]]
            self._decode(rows, sampling, step)
            yield from (row.completion() for row in rows)

    def _row(self, index: int, prompt: Prompt, sample: int, sampling: Sampling) -> _Row:
        encoding = self.tokenizer(
            well_formed(prompt.text),
            add_special_tokens=not prompt.control_tokens,
            split_special_tokens=not prompt.control_tokens,
            verbose=False,
        )
        ids: list[int] = encoding.input_ids
        generator = torch.Generator().manual_seed(sampling.seed_of(prompt, sample))
        return _Row(index, sample, ids or [self.tokenizer.eos_token_id], generator)

    def _decode(self, rows: list[_Row], sampling: Sampling, tell: Step) -> None:
        device = self.model.device
        longest = max(len(row.ids) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros(len(rows), longest + sampling.max_tokens, dtype=torch.int64)
        for index, row in enumerate(rows):
            ids[index, longest - len(row.ids) :] = torch.tensor(row.ids)
            mask[index, longest - len(row.ids) :] = 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        mask, positions = mask.to(device), positions.to(device)
        step, length, cache = ids.to(device), longest, None
        ends = self._end_tokens()
        for number in range(1, sampling.max_tokens + 1):
            out = self.model(
                input_ids=step,
                attention_mask=mask[:, :length],
                position_ids=positions[:, length - step.shape[1] : length],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            chosen = [self._choose(row, logits, sampling) for row, logits in zip(rows, out.logits[:, -1], strict=True)]
            for row, token in zip(rows, chosen, strict=True):
                self._append(row, token, ends, sampling.stop)
            tell(number / sampling.max_tokens)
            if all(row.done for row in rows):
                return
            step, length = torch.tensor(chosen, device=device)[:, None], length + 1

    def _choose(self, row: _Row, logits: Tensor, sampling: Sampling) -> int:
        """The next token of a row from logits [vocabulary]."""
        if row.done or sampling.temperature == 0.0:
            return int(logits.argmax())
        probabilities = torch.softmax(logits.double().cpu() / sampling.temperature, dim=-1)
        ordered, ids = probabilities.sort(descending=True, stable=True)
        # A token belongs to the nucleus if those before it do not yet reach top_p.
        ordered[ordered.cumsum(-1) - ordered >= sampling.top_p] = 0.0
        return int(ids[torch.multinomial(ordered, 1, generator=row.generator)])

    def _append(self, row: _Row, token: int, ends: frozenset[int], stop: Sequence[str]) -> None:
        if row.done:
            return
        if token in ends:
            row.done = row.stopped = True
            return
        row.tokens.append(token)
        text = self.tokenizer.decode(row.tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        row.text, row.stopped = stop_at(text, stop)
        row.done = row.stopped

    def _end_tokens(self) -> frozenset[int]:
        """The tokenizer's end of text and those that the model's generation config names."""
        config = getattr(self.model, "generation_config", None)
        ends = getattr(config, "eos_token_id", None)
        ids = ends if isinstance(ends, list) else [ends]
        return frozenset(one for one in (*ids, self.tokenizer.eos_token_id) if one is not None)
