"""Any endpoint that speaks OpenAI's completions protocol: vLLM, SGLang, llama-server.

Prompts go to ``/completions`` as they were rendered here; with ``chat``, messages go to ``/chat/completions`` and the
server's own template renders them. Servers that echo a prompt with log-probabilities (vLLM does) also give perplexity.

What a request leaves out, a server takes from the model: vLLM and SGLang from generation_config.json (temperature,
top_k, top_p, min_p, repetition_penalty), llama-server from the file's ``general.sampling.*`` and its own defaults. So
every request says all of it (:data:`PINNED`), or greedy decoding would not be greedy.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from qconv.boundary.printable import well_formed
from qconv.errors import EngineError, IncapableEngineError, UnscorableError
from qconv.evaluation.engines.base import Completion, Logits, Prompt, Sampling, Step, silent, stop_at
from qconv.evaluation.engines.endpoint import ATTEMPTS, TIMEOUT, Endpoint, RefusedError

PINNED: Mapping[str, float] = {
    "top_k": -1,  # the whole vocabulary to vLLM, SGLang and llama-server; older vLLM and SGLang refuse 0
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "repeat_penalty": 1.0,  # llama-server's and Ollama's name for it
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""What is neither greedy decoding nor the sampling that was asked for unless it is said; see :class:`Sampling`."""
_REFUSALS = frozenset({400, 422})
"""Statuses by which servers refuse a field that they do not know."""
_CERTAIN = 1e-4
"""How far above 0 rounding may put the log-probability of a certain token: float32 keeps 1e-7 of 1, bfloat16 less."""
_LONGEST_NAME = 4096

T = TypeVar("T")
S = TypeVar("S")


class OpenAIEngine:
    """A served model. At most ``rows`` requests are under way at once."""

    def __init__(
        self,
        address: str,
        *,
        chat: bool = False,
        model: str | None = None,
        rows: int = 8,
        timeout: float = TIMEOUT,
        attempts: int = ATTEMPTS,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Ask the endpoint what it serves.

        Args:
            address: The protocol's root, such as ``http://localhost:8000/v1``.
            chat: Whether the server renders prompts.
            model: Which of the served models; the first by default.
            rows: Requests under way at once.
            timeout: Seconds in which a request must be answered whole.
            attempts: How often a request is tried that fails in passing.
            sleep: Waits between attempts.

        Raises:
            UsageError: not an address.
            EngineError: nothing answers there, or it serves no such model.
        """
        self._endpoint = Endpoint(address, timeout=timeout, attempts=attempts, sleep=sleep)
        self.address = self._endpoint.address
        self.rows = rows
        self._chat = chat
        self._refused: frozenset[str] = frozenset()
        self._lock = threading.Lock()
        served = self._served()
        if not served or (model is not None and model not in served):
            raise EngineError(f"{self.address}: serves {', '.join(served) or 'no model'}, not {model}.")
        self.model = served[0] if model is None else model

    @property
    def identity(self) -> Mapping[str, str]:
        """The server's versions are not known, so its address stands for them."""
        kind = "openai-chat" if self._chat else "openai"
        settings = ", ".join(f"{name} {value:g}" for name, value in PINNED.items())
        rows = str(self.rows)
        return {"engine": kind, "address": self.address, "model": self.model, "rows": rows, "settings": settings}

    @property
    def refused(self) -> tuple[str, ...]:
        """Names of :data:`PINNED` that the server refused, so that it took what it has for them."""
        return tuple(name for name in PINNED if name in self._refused)

    def logits(self, sequences: Sequence[Sequence[int]]) -> Iterator[Logits]:
        """No endpoint gives whole distributions.

        Raises:
            IncapableEngineError: always.
        """
        raise IncapableEngineError(
            f"{self.address}: an endpoint gives no whole distributions, so divergence cannot be measured through it.",
            hint="Measure text without --reference, or on the build's files with another engine.",
        )

    def likelihoods(self, sequences: Sequence[Sequence[int]]) -> Iterator[NDArray[np.float32]]:
        """Log-probability of each token but the first of each sequence, float32 [tokens - 1], by echoing the prompt.

        Raises:
            UnscorableError: the server does not echo prompts with log-probabilities, or with impossible ones.
            EngineError: the endpoint failed.
        """

        def score(sequence: Sequence[int]) -> NDArray[np.float32]:
            body = {"prompt": list(sequence), "max_tokens": 1, "temperature": 0.0, "echo": True, "logprobs": 1}
            try:
                answer, choice = self._post("completions", body)
            except RefusedError as error:
                raise self._unscorable(f"it refuses (HTTP {error.status}: {error.told})") from error
            return self._log_probabilities(len(sequence), answer, choice)

        return self._each(score, sequences)

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling, step: Step = silent) -> Iterator[Completion]:
        """One request for each sample, in order."""
        jobs = [(index, sample) for index in range(len(prompts)) for sample in range(sampling.samples)]

        def answer(job: tuple[int, int]) -> Completion:
            index, sample = job
            return self._complete(prompts[index], index, sample, sampling)

        return self._each(answer, jobs)

    def close(self) -> None:
        """Nothing is held."""

    def _complete(self, prompt: Prompt, index: int, sample: int, sampling: Sampling) -> Completion:
        body: dict[str, Any] = {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed_of(prompt, sample) >> 32,  # servers take 31 bits
            "stream": False,
        }
        # Some servers take four stop strings at most: the rest is cut off here.
        body |= {"stop": list(sampling.stop[:4])} if sampling.stop else {}
        if self._chat:
            messages = [dict(one) for one in prompt.messages or ({"role": "user", "content": prompt.text},)]
            answer, choice = self._post("chat/completions", {**body, "messages": messages})
            message = choice.get("message")
            if not isinstance(message, dict):
                raise self._endpoint.form_error("chat/completions", "the choice holds no message", answer)
            text = _content(message.get("content"))
        else:
            # The server puts BOS before a text as the tokenizer does.
            answer, choice = self._post(
                "completions", {**body, "prompt": well_formed(prompt.text).removeprefix(prompt.bos)}
            )
            text = _content(choice.get("text", choice))
        if text is None:
            path = "chat/completions" if self._chat else "completions"
            raise self._endpoint.form_error(path, "the choice holds no text", answer)
        text, stopped = stop_at(well_formed(text), sampling.stop)
        ended = stopped or choice.get("finish_reason") != "length"
        return Completion(index, sample, text, (), "stop" if ended else "length")

    def _log_probabilities(self, tokens: int, answer: Any, choice: Mapping[str, Any]) -> NDArray[np.float32]:
        """Of the prompt's tokens but the first, known to be what a model can give.

        Raises:
            UnscorableError: they are not.
        """
        told = choice.get("logprobs")
        values = told.get("token_logprobs") if isinstance(told, dict) else None
        if not isinstance(values, list) or all(one is None for one in values):
            raise self._unscorable("it does not echo prompts with log-probabilities")
        usage = answer.get("usage")
        counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        # Of the prompt and, where the server tells it, of the one token that is generated.
        if len(values) not in (tokens, tokens + 1) or (isinstance(counted, int) and counted != tokens):
            raise self._unscorable(
                f"of {tokens} tokens it gives {len(values)} log-probabilities and counts {counted} tokens, as servers "
                "do that add a BOS of their own"
            )
        scored = values[1:tokens]
        wrong = [one for one in scored if not _is_log_probability(one)]
        if wrong:
            raise self._unscorable(f"it gives {str(wrong[0])[:40]!r} where a log-probability must be")
        if scored and not any(scored):
            raise self._unscorable("it gives every token the log-probability 0")
        return np.array([min(one, 0.0) for one in scored], dtype=np.float32)

    def _unscorable(self, problem: str) -> UnscorableError:
        return UnscorableError(
            f"{self.address}: the server cannot score prompts: {problem}.",
            hint="Choose a suite that only generates, or measure the build's files with another engine.",
        )

    def _each(self, work: Callable[[S], T], items: Sequence[S]) -> Iterator[T]:
        """Results in order; what has not begun is not begun after a failure."""
        with ThreadPoolExecutor(self.rows) as pool:
            try:
                yield from pool.map(work, items)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _served(self) -> list[str]:
        """Names of the served models."""
        found = self._endpoint.request("models")
        models = found.get("data") if isinstance(found, dict) else None
        listed = models if isinstance(models, list) else [None]
        names = [one.get("id") if isinstance(one, dict) else None for one in listed]
        known = [one for one in names if isinstance(one, str) and 0 < len(one) <= _LONGEST_NAME]
        if len(known) < len(names):
            raise self._endpoint.form_error("models", "that is no list of models", found)
        return known

    def _post(self, path: str, body: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """The answer and its first choice; without the fields of :data:`PINNED` that the server refuses."""
        left_out, first = self._refused, None
        while True:
            sent = {name: value for name, value in PINNED.items() if name not in left_out}
            try:
                answer = self._endpoint.request(path, {"model": self.model, **body, **sent})
            except RefusedError as error:
                first = first or error
                if error.status not in _REFUSALS or not sent:
                    raise first from None
                left_out |= {name for name in sent if name in error.told} or set(sent)
                continue
            with self._lock:
                self._refused |= left_out
            choices = answer.get("choices") if isinstance(answer, dict) else None
            if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
                raise self._endpoint.form_error(path, "the answer holds no choice", answer)
            return answer, choices[0]


def _content(value: Any) -> str | None:
    """A text, or the texts of its parts; an answer that says nothing is an empty one. None: it is none of that."""
    if value is None:
        return ""
    if isinstance(value, list):
        parts = [one.get("text", "") if isinstance(one, dict) else None for one in value]
        return "".join(map(str, parts)) if all(isinstance(one, str) for one in parts) else None
    return value if isinstance(value, str) else None


def _is_log_probability(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and -float(np.finfo(np.float32).max) <= value <= _CERTAIN
