"""Any endpoint that speaks OpenAI's completions protocol: vLLM, SGLang, llama-server.

Prompts go to ``/completions`` as they were rendered here; with ``chat``, messages go to ``/chat/completions`` and the
server's own template renders them. Servers that echo a prompt with log-probabilities (vLLM does) also give perplexity.
"""

from __future__ import annotations

import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from qconv.errors import EngineError, IncapableEngineError, UsageError
from qconv.evaluation.engines.base import Completion, Logits, Prompt, Sampling, Step, silent, stop_at

KEY_VARIABLE = "OPENAI_API_KEY"
ATTEMPTS = 6
TIMEOUT = 600.0
"""Seconds in which one request must be answered."""
_FIRST_WAIT = 0.5
_LONGEST_WAIT = 30.0
_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that may be gone at the next attempt."""

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
            timeout: Seconds in which a request must be answered.
            attempts: How often a request is tried that fails in passing.
            sleep: Waits between attempts.

        Raises:
            UsageError: not an address.
            EngineError: nothing answers there, or it serves no such model.
        """
        if not address.startswith(("http://", "https://")):
            raise UsageError(f"--engine openai:{address}: no http address.", hint="Write openai:http://HOST:PORT/v1.")
        self.address = address.rstrip("/")
        self.rows = rows
        self._chat, self._timeout, self._attempts, self._sleep = chat, timeout, attempts, sleep
        served = [str(one["id"]) for one in self._list("models")]
        if not served or (model is not None and model not in served):
            raise EngineError(f"{address}: serves {', '.join(served) or 'no model'}, not {model}.")
        self.model = served[0] if model is None else model

    @property
    def identity(self) -> Mapping[str, str]:
        """The server's versions are not known, so its address stands for them."""
        kind = "openai-chat" if self._chat else "openai"
        return {"engine": kind, "address": self.address, "model": self.model, "rows": str(self.rows)}

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
            IncapableEngineError: the server does not echo prompts with log-probabilities.
            EngineError: the endpoint failed.
        """

        def score(sequence: Sequence[int]) -> NDArray[np.float32]:
            body = {"prompt": list(sequence), "max_tokens": 1, "temperature": 0.0, "echo": True, "logprobs": 1}
            found = (self._post("completions", body)["choices"][0].get("logprobs") or {}).get("token_logprobs") or []
            if len(found) < len(sequence):
                raise IncapableEngineError(
                    f"{self.address}: the server does not echo prompts with log-probabilities.",
                    hint="Choose a suite that only generates, or measure the build's files with another engine.",
                )
            return np.array(found[1 : len(sequence)], dtype=np.float32)

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
            choice = self._post("chat/completions", {**body, "messages": messages})["choices"][0]
            text = choice["message"].get("content") or ""
        else:
            choice = self._post("completions", {**body, "prompt": prompt.text})["choices"][0]
            text = choice["text"]
        text, stopped = stop_at(text, sampling.stop)
        ended = stopped or choice.get("finish_reason") != "length"
        return Completion(index, sample, text, (), "stop" if ended else "length")

    def _each(self, work: Callable[[S], T], items: Sequence[S]) -> Iterator[T]:
        """Results in order; what has not begun is not begun after a failure."""
        with ThreadPoolExecutor(self.rows) as pool:
            try:
                yield from pool.map(work, items)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _list(self, path: str) -> list[Any]:
        found = self._request(path, None).get("data")
        return found if isinstance(found, list) else []

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        found = self._request(path, json.dumps({"model": self.model, **body}).encode())
        if not found.get("choices"):
            raise EngineError(f"{self.address}/{path}: the answer holds no choice: {str(found)[:200]}.")
        return found

    def _request(self, path: str, data: bytes | None) -> dict[str, Any]:
        """One request, again after failures that may pass, waiting twice as long each time (but for a random share).

        Raises:
            EngineError: it failed for good.
        """
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {os.environ[KEY_VARIABLE]}"
        url = f"{self.address}/{path}"
        problem = ""
        for attempt in range(self._attempts):
            if attempt:
                self._sleep(min(_LONGEST_WAIT, _FIRST_WAIT * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0))
            request = urllib.request.Request(url, data=data, headers=headers)  # GET without data, else POST
            try:
                with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                    found: dict[str, Any] = json.loads(answer.read())
                    return found
            except urllib.error.HTTPError as error:
                with error:
                    told = error.read(300).decode(errors="replace")
                problem = f"HTTP {error.code}: {told}"
                if error.code not in _PASSING:
                    break
            except (OSError, ValueError) as error:  # no connection, a timeout, an answer that is no JSON
                problem = str(getattr(error, "reason", error)) or type(error).__name__
        raise EngineError(f"{url}: {problem}.", hint="Check that the server runs and that its log shows no error.")
