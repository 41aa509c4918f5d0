"""Requests against servers that send what no server should: byte by byte, without end, elsewhere."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qconv.errors import EngineError, UsageError
from qconv.evaluation.engines import endpoint
from qconv.evaluation.engines.endpoint import KEY_VARIABLE, Endpoint, RefusedError

Talk = Callable[[socket.socket], None]
OK = b"HTTP/1.1 200 OK\r\n"


class RawServer:
    """Reads each request's head, then lets ``talk`` write what it likes; keeps the heads."""

    def __init__(self, talk: Talk) -> None:
        self.heads: list[bytes] = []
        self._talk = talk
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}/v1"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
            self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(4096)
            self.heads.append(head)
            self._talk(connection)

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def serve() -> Iterator[Callable[[Talk], RawServer]]:
    servers: list[RawServer] = []

    def start(talk: Talk) -> RawServer:
        servers.append(RawServer(talk))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def says(data: bytes) -> Talk:
    return lambda connection: connection.sendall(data)


def body(data: bytes) -> bytes:
    return OK + b"Content-Length: %d\r\n\r\n" % len(data) + data


def asked(address: str, **options: float) -> object:
    values = {"timeout": 5.0, "attempts": 1} | options
    return Endpoint(address, timeout=values["timeout"], attempts=int(values["attempts"]), sleep=lambda _: None).request(
        "models"
    )


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_the_key_stays(
    status: int, serve: Callable[[Talk], RawServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = serve(says(body(b"{}")))
    target = f"http://localhost:{other.port}/v1/models"
    first = serve(says(b"HTTP/1.1 %d Moved\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % (status, target.encode())))
    monkeypatch.setenv(KEY_VARIABLE, "secret-1")
    with pytest.raises(RefusedError, match=rf"redirects \(HTTP {status}\) to {target}") as caught:
        asked(first.address, attempts=3)
    assert caught.value.hint == f"If that is the server that you mean, give http://localhost:{other.port}/v1."
    assert b"Bearer secret-1" in first.heads[0]
    assert len(first.heads) == 1
    assert other.heads == []


def test_a_redirect_to_a_file_is_not_read(serve: Callable[[Talk], RawServer], tmp_path: Path) -> None:
    (tmp_path / "models").write_text('{"private": 1}')
    server = serve(says(b"HTTP/1.1 302 x\r\nLocation: file://%s\r\nContent-Length: 0\r\n\r\n" % bytes(tmp_path)))
    with pytest.raises(RefusedError, match="redirects"):
        asked(server.address)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (OK + b"Content-Length: 1000\r\n\r\n{", "cut short"),
        (OK + b'Transfer-Encoding: chunked\r\n\r\n1000\r\n{"a":', "cut short"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nzzzz\r\n{}\r\n0\r\n\r\n", "cut short"),
        (b"HTTP/1.1 banana\r\n\r\n", "no HTTP answer.*banana"),
        (b"hello\r\n\r\n", "no HTTP answer.*hello"),
        (OK + b"X: " + b"a" * 70_000 + b"\r\n\r\n", "header line"),  # more than http.client's 65,536
        (OK + b"X: a\r\n" * 200 + b"\r\n", "headers"),  # more than its 100
        (b"", "closed connection"),
        (body(b"<html>"), "no JSON.*<html>"),
        (body(b"\xff\xfe"), "no JSON"),
        (body(b"[" * 100_000), "no JSON"),  # deeper than Python can nest
        (body(b""), "no JSON"),
    ],
)
def test_what_is_no_answer_is_asked_for_again_and_then_told(
    answer: bytes, problem: str, serve: Callable[[Talk], RawServer]
) -> None:
    server = serve(says(answer))
    with pytest.raises(EngineError, match=problem):
        asked(server.address, attempts=2)
    assert len(server.heads) == 2


def test_a_cut_answer_may_be_whole_the_next_time(serve: Callable[[Talk], RawServer]) -> None:
    answers = iter([OK + b"Content-Length: 9\r\n\r\n{", body(b'{"a": 1}')])
    server = serve(lambda connection: connection.sendall(next(answers)))
    assert asked(server.address, attempts=2) == {"a": 1}


@pytest.mark.parametrize("head", [OK + b"Content-Length: 100000\r\n\r\n", OK + b"X: ", b"HTTP/1.1 2"])
def test_a_drip_ends_at_the_deadline(head: bytes, serve: Callable[[Talk], RawServer]) -> None:
    """Each byte comes well within the time of a socket; the whole never comes."""
    over = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.sendall(head)
        while not over.wait(0.05):
            connection.sendall(b" ")

    server, started = serve(drip), time.monotonic()
    with pytest.raises(EngineError, match="timed out"):
        asked(server.address, timeout=0.4)
    over.set()
    assert time.monotonic() - started < 5.0  # a busy machine's share; without a deadline it would be for ever


def test_a_body_without_end_is_refused(serve: Callable[[Talk], RawServer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "LARGEST_ANSWER", 1 << 20)

    def flood(connection: socket.socket) -> None:
        connection.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n")
        while True:
            connection.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")

    server = serve(flood)
    with pytest.raises(EngineError, match="larger than 1 MiB"):
        asked(server.address, attempts=3)
    assert len(server.heads) == 1  # it would be as large again


def test_a_server_that_repeats_the_key_does_not_make_it_into_the_error(
    serve: Callable[[Talk], RawServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "secret-2")
    told = b'{"error": "wrong key secret-2"}'
    server = serve(says(b"HTTP/1.1 401 No\r\nContent-Length: %d\r\n\r\n" % len(told) + told))
    with pytest.raises(EngineError, match=r"HTTP 401.*wrong key \*\*\*") as caught:
        asked(server.address)
    assert "secret-2" not in str(caught.value)


def test_an_address_without_v1_gets_a_hint(serve: Callable[[Talk], RawServer]) -> None:
    server = serve(says(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n"))
    root = server.address.removesuffix("/v1")
    with pytest.raises(EngineError, match="HTTP 404") as caught:
        asked(root)
    assert caught.value.hint is not None
    assert f"{root}/v1" in caught.value.hint
    with pytest.raises(EngineError, match="HTTP 404") as caught:
        asked(server.address)
    assert "/v1" not in str(caught.value.hint)


@pytest.mark.parametrize(
    "address",
    [
        "localhost:8000",
        "ftp://h/v1",
        "http://",
        "http://h:port/v1",
        "http://h:99999/v1",
        "http://[::1/v1",
        "http://h/v1?a=b",
        "http://h h/v1",
        "http://h/\n",
        "http://höst/v1",
    ],
)
def test_what_is_no_address_is_refused_before_anything_is_sent(address: str) -> None:
    with pytest.raises(UsageError, match="--engine openai:"):
        Endpoint(address)


def test_a_password_in_an_address_is_refused_without_being_shown() -> None:
    with pytest.raises(UsageError, match="openai:h/v1: a name or password") as caught:
        Endpoint("http://me:secret-3@h/v1")
    assert "secret-3" not in str(caught.value)


@pytest.mark.parametrize("key", ["a\nb", "schlüssel"])
def test_a_key_that_no_header_holds_is_refused_without_being_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(UsageError, match=KEY_VARIABLE) as caught:
        Endpoint("http://h/v1")
    assert key not in str(caught.value)


def test_a_body_is_posted(serve: Callable[[Talk], RawServer]) -> None:
    server = serve(says(body(json.dumps([1, None]).encode())))
    assert Endpoint(server.address + "/").request("completions", {"a": 1}) == [1, None]
    assert server.heads[0].startswith(b"POST /v1/completions HTTP/1.1")
