"""What an engine must do to be measured: give logits of token sequences, and complete prompts.

Nothing but NumPy is imported here, so that an engine can live in an interpreter that has little else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol, Self, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from qconv.runtime.decoding import Setting, decoding_settings

Step: TypeAlias = Callable[[float], None]
"""Told the share of a batch that is done."""
Logits: TypeAlias = NDArray[np.float32]
"""[tokens, vocabulary]: row t is the distribution of the token after token t, not normalized."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be completed.

    Attributes:
        text: The prompt as rendered: exactly what the model reads.
        control_tokens: Whether control tokens in ``text`` are meant, as a chat template writes them.
        messages: The chat that ``text`` is a rendering of, for endpoints that render it themselves.
        bos: What ``text`` begins with if that is a BOS which the tokenizer puts before a text anyway: whoever leaves
            tokenizing to a server sends the rest. Else empty.
    """

    text: str
    control_tokens: bool = False
    messages: tuple[Mapping[str, str], ...] | None = None
    bos: str = ""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How prompts are completed.

    Attributes:
        max_tokens: The most tokens of one completion.
        temperature: 0 is greedy decoding.
        top_p: Sample from the most probable tokens that together have this probability.
        samples: Completions of one prompt.
        stop: A completion ends before the first of these strings.
        seed: Sample s of prompt p is drawn with a generator that depends on seed, p's text and s alone.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    stop: tuple[str, ...] = ()
    seed: int = 0

    def digest(self) -> str:
        """sha256 of the settings, hexadecimal."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def settings(self) -> dict[str, Setting]:
        """Everything that decides which token comes next, for the record."""
        return decoding_settings(self.max_tokens, self.temperature, seed=self.seed, top_p=self.top_p, stop=self.stop)

    def seed_of(self, prompt: Prompt, sample: int) -> int:
        """The seed of one completion, below 2**63."""
        key = json.dumps([self.seed, prompt.text, sample]).encode()
        return int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion.

    Attributes:
        prompt: Index of its prompt.
        sample: Which of the prompt's samples it is.
        text: The text, without the stop string.
        tokens: Ids of the generated tokens, with those of the stop string; empty where the engine does not tell.
        finish: Whether a stop string or end-of-text token ended it, or its length.
    """

    prompt: int
    sample: int
    text: str
    tokens: tuple[int, ...]
    finish: Literal["stop", "length"]


def silent(share: float) -> None:
    """Nobody is told."""


class Engine(Protocol):
    """Something that computes a model.

    Greedy decoding and logits are not invariant to the shape of a batch, so an engine works in groups that depend on
    its arguments alone: the same sequences or prompts in the same order give the same numbers, bit for bit.
    """

    @property
    def identity(self) -> Mapping[str, str]:
        """Everything but the weights that may change a number: engine, versions, dtype, device, rows of a batch."""

    @property
    def rows(self) -> int:
        """Sequences or prompts of one batch; a caller that resumes starts at a multiple of it."""

    def logits(self, sequences: Sequence[Sequence[int]]) -> Iterator[Logits]:
        """Of each sequence, in order.

        Raises:
            IncapableEngineError: the engine cannot tell whole distributions.
            EngineError: the engine failed.
        """

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling, step: Step = silent) -> Iterator[Completion]:
        """Every sample of every prompt, in batches of neighbouring prompts, so that a caller can save its progress.

        Args:
            prompts: What is to be completed.
            sampling: How.
            step: Told after every token of a batch which share of the most that it may take is done; engines that hand
                over completions one by one need not.

        Raises:
            IncapableEngineError: the engine cannot generate.
            EngineError: the engine failed.
        """

    def close(self) -> None:
        """Free the model; the engine cannot be used again."""


@runtime_checkable
class LikelihoodEngine(Protocol):
    """An engine that tells how probable given tokens are, though not whole distributions."""

    def likelihoods(self, sequences: Sequence[Sequence[int]]) -> Iterator[NDArray[np.float32]]:
        """Log-probability of each token but the first of each sequence, float32 [tokens - 1].

        Raises:
            IncapableEngineError: this one does not.
            EngineError: the engine failed.
        """


class LogitWindows(Protocol):
    """Logits of neighbouring tokens of a sequence: its place, the first token's in it, [tokens, vocabulary]."""

    @property
    def sequence(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def logits(self) -> Logits: ...


@runtime_checkable
class WindowEngine(Protocol):
    """An engine that gives the logits of sequences piece by piece, so that they need not fit into memory."""

    def at(self, path: Path) -> Self:
        """The same engine on another folder's model."""

    def logit_windows(self, sequences: Sequence[Sequence[int]]) -> Iterator[LogitWindows]:
        """Neighbouring tokens' logits, in order; all sequences pass a layer before the next one is read.

        Raises:
            EngineError: the engine failed.
        """


@runtime_checkable
class RefusingEngine(Protocol):
    """An engine whose server may refuse to be told some settings, and then applies its own."""

    @property
    def refused(self) -> tuple[str, ...]:
        """Names of the settings that were refused so far."""


def stop_at(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there is one."""
    found = [position for position in (text.find(one) for one in stop if one) if position >= 0]
    return (text[: min(found)], True) if found else (text, False)
