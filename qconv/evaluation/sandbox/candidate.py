"""One candidate's process, seen from outside: a function that is called over a pipe."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import subprocess
import threading
import time
from types import TracebackType
from typing import Protocol, Self

from qconv.evaluation.sandbox.guard import Guard
from qconv.evaluation.sandbox.limits import Limits
from qconv.evaluation.sandbox.literals import (
    LARGEST_MESSAGE,
    Json,
    Literal,
    NotLiteral,
    decode,
    encode,
    read_message,
    write_message,
)
from qconv.evaluation.sandbox.seccomp import seccomp_filter
from qconv.evaluation.sandbox.verdict import CandidateFailed, SandboxFailed, Status

_BLOCK = 1 << 16
_EXIT_SECONDS = 2.0
"""Between the end of a pipe and the end of the process that held it."""
_ERRORS = {"raised": Status.FAIL, "value": Status.FAIL, "memory": Status.MEMORY}
_DETAIL = 300


class Backend(Protocol):
    """A program that makes sandboxes."""

    @property
    def name(self) -> str:
        """For reports."""

    def start(self, limits: Limits, group: int) -> subprocess.Popen[bytes]:
        """A guest (``guest.py``) in a new sandbox, with three pipes, in a process group (``guard.Guard``).

        It may remount its /tmp (CAP_SYS_ADMIN in its user namespace), and gives that up before any other code runs.
        """


class Running:
    """The candidates that run, so that all of them can be ended at once, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._guards: set[Guard] = set()
        self._ended = False

    def guard(self) -> Guard:
        """A guard for a new candidate.

        Raises:
            OSError: they were ended already, or no process can be started.
        """
        with self._lock:
            if self._ended:
                raise OSError("the run was interrupted")
            guard = Guard()
            self._guards.add(guard)
            return guard

    def forget(self, guard: Guard) -> None:
        """Its candidate has ended."""
        with self._lock:
            self._guards.discard(guard)

    def end(self) -> None:
        """End them all, and let no other start."""
        with self._lock:
            self._ended = True
            for guard in self._guards:
                guard.end()


class Candidate:
    """A candidate in its sandbox. A context manager; leaving it ends the process and everything in it.

    Values are copied on their way (``literals``), so neither side holds an object of the other. Every request has a
    fresh nonce that the answer must repeat: nothing can be answered in advance. After a failure every further call
    fails the same way, whatever the check does with the exception.
    """

    def __init__(self, backend: Backend, limits: Limits, running: Running | None = None) -> None:
        """Start the sandbox, as one of those that are ``running``.

        Raises:
            SandboxFailed: it did not start.
        """
        self._limits = limits
        self._buffer = b""
        self._loaded = time.monotonic()
        self.failure: CandidateFailed | None = None
        try:
            self._running = running or Running()
            self._guard = self._running.guard()
        except OSError as error:
            raise SandboxFailed(f"no process can be started: {error}") from error
        try:
            self._process = backend.start(limits, self._guard.group)
        except BaseException as error:
            self._guard.end()
            self._running.forget(self._guard)
            if isinstance(error, OSError | subprocess.SubprocessError):
                raise SandboxFailed(f"{backend.name} cannot be started: {error}") from error
            raise
        try:
            self._descriptors = self._open()
            self._deadline = time.monotonic() + limits.start_seconds
            self._set_up()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def load(self, program: str, entry_point: str) -> None:
        """Execute the candidate's source; from here on it is responsible for whatever happens.

        Raises:
            CandidateFailed: it raised, or defines no function ``entry_point``.
        """
        self._loaded = time.monotonic()
        self._deadline = self._loaded + self._limits.wall_seconds
        self._request({"program": program, "entry_point": entry_point})

    def call(self, *arguments: object, **keywords: object) -> Literal:
        """The function's result, made of exact builtin types.

        Raises:
            CandidateFailed: it gave none.
            NotLiteral: an argument cannot travel; that is the check's fault.
        """
        return self._request({"arguments": encode(list(arguments)), "keywords": encode(keywords)})

    def close(self) -> None:
        """End the process. The kernel ends all that is in its PID namespace with it."""
        self._guard.end()
        self._running.forget(self._guard)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._process.wait()

    def _open(self) -> tuple[int, int, int]:
        streams = (self._process.stdin, self._process.stdout, self._process.stderr)
        descriptors = [stream.fileno() for stream in streams if stream is not None]
        for descriptor in descriptors:
            os.set_blocking(descriptor, False)
        into, out, errors = descriptors
        return into, out, errors

    def _set_up(self) -> None:
        nonce = secrets.token_hex(8)
        limits: Json = {name: list(pair) for name, pair in self._limits.resources().items()}
        try:
            setup: dict[str, Json] = {"limits": limits, "tmpfs": self._limits.tmpfs, "seccomp": seccomp_filter().hex()}
            self._send(write_message(setup | {"nonce": nonce}))
            if read_message(self._receive()) != {"nonce": nonce}:
                raise SandboxFailed("the sandbox's first words are not the guest's")
        except (CandidateFailed, NotLiteral) as error:
            raise SandboxFailed(f"the sandbox did not start: {self._complaint() or error}") from error

    def _complaint(self) -> str:
        """What was written to stderr, by the sandbox's own program or the guest: no candidate has run yet."""
        with contextlib.suppress(OSError):
            return printable(os.read(self._descriptors[2], _BLOCK).decode(errors="replace").strip()[-_DETAIL:])
        return ""

    def _request(self, fields: dict[str, Json]) -> Literal:
        if self.failure is not None:
            raise self.failure
        nonce = secrets.token_hex(8)
        line = write_message(fields | {"nonce": nonce})
        try:
            self._send(line)
            return self._value(self._receive(), nonce)
        except CandidateFailed as failure:
            self.failure = failure
            raise

    def _value(self, line: bytes, nonce: str) -> Literal:
        try:
            answer = read_message(line)
            if answer.pop("nonce", None) != nonce:
                raise NotLiteral("another nonce than the request's")
            if answer.keys() == {"value"}:
                return decode(answer["value"])
            kind, detail = answer.get("error"), answer.get("detail")
            if answer.keys() != {"error", "detail"} or not isinstance(kind, str) or not isinstance(detail, str):
                raise NotLiteral("unknown fields")
            if kind not in _ERRORS:
                raise NotLiteral("an unknown error")
        except NotLiteral as error:
            raise CandidateFailed(Status.PROTOCOL, f"an answer that the guest does not give: {error}") from None
        prefix = "its result cannot be passed on: " if kind == "value" else ""
        raise CandidateFailed(_ERRORS[kind], prefix + printable(detail[:_DETAIL]))

    def _send(self, line: bytes) -> None:
        view = memoryview(line)
        while view:
            self._wait(self._descriptors[0], select.POLLOUT)
            try:
                view = view[os.write(self._descriptors[0], view) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise self._ended() from None

    def _receive(self) -> bytes:
        while b"\n" not in self._buffer:
            if len(self._buffer) > LARGEST_MESSAGE:
                raise CandidateFailed(Status.PROTOCOL, f"an answer of more than {LARGEST_MESSAGE:,} bytes")
            self._wait(self._descriptors[1], select.POLLIN)
            try:
                block = os.read(self._descriptors[1], _BLOCK)
            except BlockingIOError:
                continue
            if not block:
                raise self._ended()
            self._buffer += block
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _wait(self, descriptor: int, event: int) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        seconds = self._deadline - time.monotonic()
        if seconds <= 0 or not poll.poll(seconds * 1000):
            raise CandidateFailed(Status.TIMEOUT, f"no answer within {self._limits.wall_seconds:g} s")

    def _ended(self) -> CandidateFailed:
        """Why the pipe ended: bubblewrap and podman exit with 128 and the number of the signal that ended the guest."""
        try:
            code = self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return CandidateFailed(Status.PROTOCOL, "it closed the pipe")
        # The hard limit kills without saying why; what was killed sooner was not killed by it.
        late = time.monotonic() - self._loaded >= self._limits.cpu_seconds
        if code == 128 + signal.SIGXCPU or (code == 128 + signal.SIGKILL and late):
            return CandidateFailed(Status.TIMEOUT, f"more than {self._limits.cpu_seconds} s of processor time")
        if code > 128:
            return CandidateFailed(Status.FAIL, f"its process ended by signal {code - 128}")
        return CandidateFailed(Status.FAIL, f"its process ended with exit code {code} before it answered")


def printable(text: str) -> str:
    """Text for terminals and reports: what is not printable, escape sequences among it, is replaced."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
