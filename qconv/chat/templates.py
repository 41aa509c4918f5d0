"""A tokenizer's chat templates, rendered in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from qconv.boundary.printable import printable, well_formed
from qconv.errors import CheckpointError, ResourceError, UsageError

SECONDS = 10
"""In which one chat must be rendered; templates take milliseconds."""
START_SECONDS = 300
"""In which the process must have started: on a busy machine importing transformers takes its time."""
FIXED_DATE = "2024-07-26"
"""What templates that ask for the date are told where the same chat must give the same tokens tomorrow."""
_TELLING = 5

_WORKER = Path(__file__).with_name("worker.py")


class RefusedChatError(CheckpointError):
    """A template does not render this chat, though it may render others."""


class ChatTemplates:
    """Renders chats as the tokenizer's own template does. A context manager; the process starts with the first chat."""

    def __init__(self, tokenizer: Any, where: str | Path, *, date: str | None = FIXED_DATE) -> None:
        """Take what rendering needs of a tokenizer.

        Args:
            tokenizer: transformers' tokenizer.
            where: The model, for messages.
            date: What the template is told if it asks for the date; None for today.
        """
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._where = printable(str(where))
        self._template: str | Mapping[str, str] | None = getattr(tokenizer, "chat_template", None)
        self._special_tokens = dict(tokenizer.special_tokens_map)
        self._date = date

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    @property
    def names(self) -> tuple[str, ...]:
        """Of all templates, sorted; a model with one calls it ``default``."""
        if isinstance(self._template, Mapping):
            return tuple(sorted(self._template))
        return ("default",) if self._template else ()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        answer: bool = False,
        name: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """A chat as text.

        Args:
            messages: Its turns.
            answer: Whether the text ends where the model's answer begins.
            name: Of several templates which; by default ``default``.
            tools: What the model may call, in OpenAI's form.
            variables: Further variables of the template, such as ``enable_thinking``.

        Raises:
            UsageError: the model has no chat template.
            RefusedChatError: the template refuses this chat, or fails on it.
            CheckpointError: the template is no template, or takes more time or memory than :data:`SECONDS` and the
                worker's limit.
        """
        if not self._template:
            raise UsageError(f"{self._where}: the model has no chat template.", hint="Give plain text.")
        try:
            named = name if isinstance(self._template, Mapping) else None
            said = {"messages": list(messages), "answer": answer, "name": named}
            said |= {"tools": None if tools is None else list(tools), "variables": dict(variables or {})}
            request = json.dumps(said).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise RefusedChatError(f"{self._where}: the chat holds what JSON cannot say: {error}.") from error
        found = self._ask(request)
        text = found.get("text")
        if isinstance(text, str):
            return well_formed(text)
        raise self._problem(str(found.get("problem")), printable(str(found.get("said"))).rstrip("."))

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
            process.wait()
        log, self._log = self._log, None
        if log is not None:
            log.close()

    def _problem(self, kind: str, said: str) -> CheckpointError:
        template = f"{self._where}: its chat template"
        if kind == "refused":
            return RefusedChatError(f"{template} does not render this chat: {said}.", hint="Check roles and contents.")
        limits = {
            "syntax": f"{template} is no Jinja template: {said}.",
            "time": f"{template} takes more than {SECONDS} s for one chat.",
            "memory": f"{template} takes too much memory for one chat.",
            "size": f"{template} makes more than 64 Mi characters of one chat.",
        }
        return CheckpointError(limits[kind], hint="Take the original model's chat template.")

    def _ask(self, request: bytes) -> dict[str, Any]:
        if self._process is None:
            self._start()
        return self._exchange(request, SECONDS)

    def _start(self) -> None:
        """Start the worker, with this interpreter's modules and nothing of this process's."""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        path = os.pathsep.join(one for one in sys.path if one)
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        )
        setup = {
            "template": self._template,
            "special_tokens": self._special_tokens,
            "date": self._date,
            "seconds": SECONDS,
        }
        self._exchange(json.dumps(setup, default=str).encode(), START_SECONDS)

    def _exchange(self, line: bytes, seconds: int) -> dict[str, Any]:
        """A line for a line; the process is killed when the time is over."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        ending, started = threading.Timer(seconds, process.kill), time.monotonic()
        ending.daemon = True
        ending.start()
        try:
            process.stdin.write(line + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = b""
        finally:
            ending.cancel()
        if answer.endswith(b"\n"):
            found: dict[str, Any] = json.loads(answer)
            return found
        took = time.monotonic() - started
        told = self._last_words()
        if took >= seconds:
            raise self._problem("time", "")
        if "MemoryError" in told:
            raise self._problem("memory", "")
        raise ResourceError(f"{self._where}: the process that renders its chat template ended: {told}.")

    def _last_words(self) -> str:
        """What the process wrote last; it is gone afterwards."""
        assert self._log is not None
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()[-_TELLING:]
        code = self._process.returncode
        self.close()
        return printable(" | ".join(lines) or f"exit status {code}")
