"""JSON over HTTP to one address, bounded: in the time of a whole request, in the size of an answer, in where it goes.

A redirect is not followed: it would carry the key, and the numbers of a run, to an address that nobody gave.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import random
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from functools import partial
from typing import IO, Any

from qconv.errors import EngineError, UsageError

KEY_VARIABLE = "OPENAI_API_KEY"
ATTEMPTS = 6
TIMEOUT = 600.0
"""Seconds in which one request must be answered, from its first byte to the answer's last."""
LARGEST_ANSWER = 64 << 20
"""Bytes; 128k tokens with their log-probabilities take about 20 MB."""
_TOLD = 300
"""Characters of an answer that an error repeats."""
_PIECE = 1 << 20
_FIRST_WAIT = 0.5
_LONGEST_WAIT = 30.0
_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that may be gone at the next attempt."""
_CHECK_SERVER = "Check that the server runs and that its log shows no error."


class RefusedError(EngineError):
    """The endpoint answered with an HTTP status that another attempt does not change.

    Attributes:
        status: The status.
        told: The beginning of what the endpoint said.
    """

    def __init__(self, message: str, status: int, told: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.told = told


class _PassingError(Exception):
    """A failure that may be gone at the next attempt; its text says what it was."""


class Endpoint:
    """An address that answers JSON."""

    def __init__(
        self,
        address: str,
        *,
        timeout: float = TIMEOUT,
        attempts: int = ATTEMPTS,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Check the address.

        Args:
            address: The protocol's root, such as ``http://localhost:8000/v1``.
            timeout: Seconds in which a request must be answered whole.
            attempts: How often a request is tried that fails in passing.
            sleep: Waits between attempts.

        Raises:
            UsageError: not an address, or a key that no header can hold.
        """
        _check_address(address)
        self.address = address.rstrip("/")
        self._timeout, self._attempts, self._sleep = timeout, attempts, sleep
        self._key = _api_key()

    def request(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer to a GET, or with a body to a POST: a JSON value.

        After failures that may pass it is asked again, waiting twice as long each time (but for a random share).

        Raises:
            RefusedError: a status that stays.
            EngineError: it failed for good.
        """
        url, problem = f"{self.address}/{path}", ""
        for attempt in range(self._attempts):
            if attempt:
                self._sleep(min(_LONGEST_WAIT, _FIRST_WAIT * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0))
            try:
                return self._once(url, path, body)
            except _PassingError as error:
                problem = str(error)
        raise EngineError(f"{url}: {problem}.", hint=_CHECK_SERVER)

    def form_error(self, path: str, problem: str, value: Any) -> EngineError:
        """An answer that is JSON but not of the protocol's form."""
        return EngineError(f"{self.address}/{path}: {problem}: {self._shown(repr(value))}.", hint=self._root_hint())

    def _once(self, url: str, path: str, body: Mapping[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(url, data=data, headers=headers)  # GET without data, else POST
        try:
            with _opener(time.monotonic() + self._timeout).open(request, timeout=self._timeout) as answer:
                text = _whole(answer, url)
        except urllib.error.HTTPError as error:
            raise self._refusal(url, path, error) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            # No connection, a deadline, a body that was cut short, a status line that is none.
            raise _PassingError(_reason(error)) from error
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _PassingError(f"no JSON, but {self._shown(text.decode(errors='replace'))!r}") from error

    def _refusal(self, url: str, path: str, error: urllib.error.HTTPError) -> Exception:
        """What an HTTP status other than success means."""
        try:
            with error:
                told = self._shown(error.read(4 * _TOLD).decode(errors="replace"))
        except (OSError, ValueError, http.client.HTTPException):
            told = ""
        if 300 <= error.code < 400:
            target = str(error.headers.get("Location") or "nowhere")
            root = target.split("?")[0].removesuffix(f"/{path}")
            usable = root.startswith(("http://", "https://"))
            return RefusedError(
                f"{url}: redirects (HTTP {error.code}) to {self._shown(target)}, where qconv does not follow.",
                error.code,
                told,
                hint=f"If that is the server that you mean, give {root}." if usable else _CHECK_SERVER,
            )
        problem = f"HTTP {error.code}: {told}"
        if error.code in _PASSING:
            return _PassingError(problem)
        hint = self._root_hint() if error.code in (404, 405) else _CHECK_SERVER
        return RefusedError(f"{url}: {problem}.", error.code, told, hint=hint)

    def _root_hint(self) -> str:
        if self.address.endswith("/v1"):
            return _CHECK_SERVER
        return f"Servers answer this protocol below /v1: try {self.address}/v1."

    def _shown(self, text: str) -> str:
        """The beginning of what a server said, without the key, which some repeat."""
        hidden = text.replace(self._key, "***") if self._key else text
        return hidden[:_TOLD]


def _check_address(address: str) -> None:
    try:
        parts = urllib.parse.urlsplit(address)
        problem = "no http address"
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            problem = "an address without query and fragment is needed" if parts.query or parts.fragment else ""
            problem = "a name or password in it would be written into every record" if parts.username else problem
        if any(not 32 < ord(one) < 127 for one in address):
            problem = "spaces and characters other than ASCII cannot be in it"
    except ValueError as error:  # a port that is no number, brackets that do not close
        problem = str(error)
    if problem:
        shown = address.rpartition("@")[2]
        raise UsageError(
            f"--engine openai:{shown}: {problem}.",
            hint=f"Write openai:http://HOST:PORT/v1; a key goes into the variable {KEY_VARIABLE}.",
        )


def _api_key() -> str:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if any(not 32 < ord(one) < 127 for one in key):
        raise UsageError(
            f"{KEY_VARIABLE} holds characters that cannot be sent.", hint="Set it to the key alone, printable ASCII."
        )
    return key


def _reason(error: Exception) -> str:
    if isinstance(error, http.client.IncompleteRead):
        return "the answer was cut short"
    if isinstance(error, http.client.BadStatusLine) and not isinstance(error, http.client.RemoteDisconnected):
        return f"no HTTP answer, but {str(error)[:_TOLD]}"
    return str(getattr(error, "reason", error)) or type(error).__name__


def _whole(answer: http.client.HTTPResponse, url: str) -> bytes:
    """The body.

    Raises:
        EngineError: it is larger than :data:`LARGEST_ANSWER`.
        http.client.IncompleteRead: the connection ended before it did.
    """
    parts, size = [], 0
    while part := answer.read(_PIECE):
        parts.append(part)
        size += len(part)
        if size > LARGEST_ANSWER:
            raise EngineError(
                f"{url}: the answer is larger than {LARGEST_ANSWER >> 20} MiB.", hint="Check what answers there."
            )
    if answer.length:  # what Content-Length promised beyond
        raise http.client.IncompleteRead(b"", answer.length)
    return b"".join(parts)


def _opener(deadline: float) -> urllib.request.OpenerDirector:
    """Opens one request: proxies as the environment names them, no redirects, all reading until the deadline."""
    return urllib.request.build_opener(_NoRedirects, _Http(deadline), _Https(deadline))


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Leaves a redirect to the handler of errors."""

    def _left(self, req: Any, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage) -> None:
        return None

    http_error_301 = http_error_302 = http_error_303 = http_error_307 = http_error_308 = _left


class _Http(urllib.request.HTTPHandler):
    def __init__(self, deadline: float) -> None:
        super().__init__()
        self._connection = partial(_Connection, deadline=deadline)

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        opened: http.client.HTTPResponse = self.do_open(self._connection, req)
        return opened


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, deadline: float) -> None:
        super().__init__()
        self._connection = partial(_SecureConnection, deadline=deadline)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        opened: http.client.HTTPResponse = self.do_open(self._connection, req)
        return opened


class _Connection(http.client.HTTPConnection):
    """Whose every wait ends at a deadline; the timeouts of sockets begin anew with each byte."""

    def __init__(self, *args: Any, deadline: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._deadline = deadline
        self.response_class = partial(_Response, deadline)  # type: ignore[assignment]  # a class is typed

    def connect(self) -> None:
        self.timeout = _left(self._deadline)
        super().connect()
        self.sock.settimeout(_left(self._deadline))


class _SecureConnection(_Connection, http.client.HTTPSConnection):
    pass


class _Response(http.client.HTTPResponse):
    def __init__(self, deadline: float, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp.close()
        self.fp = io.BufferedReader(_Until(deadline, sock))


class _Until(io.RawIOBase):
    """What a socket receives until a deadline."""

    def __init__(self, deadline: float, sock: socket.socket) -> None:
        self._deadline, self._socket = deadline, sock
        self._raw = sock.makefile("rb", buffering=0)  # keeps the connection open when the socket's owner lets go

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._socket.settimeout(_left(self._deadline))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _left(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("timed out")
    return seconds
