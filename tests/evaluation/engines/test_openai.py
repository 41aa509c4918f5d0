"""The endpoint engine against a small server that misbehaves as servers do."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from qconv.errors import EngineError, UsageError
from qconv.evaluation.engines.base import Prompt, Sampling
from qconv.evaluation.engines.openai import OpenAIEngine

Answer = Callable[[str, dict[str, Any]], tuple[int, Any]]


class Server:
    """Answers by a function of path and body; keeps what it was asked."""

    def __init__(self, answer: Answer) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = self.most_at_once = 0
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send(200, {"data": [{"id": "small"}, {"id": "large"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.asked.append((self.path, body))
                    server.headers.append(dict(self.headers))
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                try:
                    status, value = answer(self.path, body)
                finally:
                    with lock:  # before the answer goes out: whoever has it may ask again at once
                        server.at_once -= 1
                self._send(status, value)

            def _send(self, status: int, value: Any) -> None:
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.address = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], Server]]:
    servers: list[Server] = []

    def start(answer: Answer) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def echo(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    return 200, {"choices": [{"text": f"<{body['prompt']}>\nclass X", "finish_reason": "length"}]}


def test_completions_come_in_order_and_stop_here_if_the_server_does_not(serve: Callable[[Answer], Server]) -> None:
    def slow_first(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.2 if body["prompt"] == "p0" else 0.0)
        return echo(path, body)

    server = serve(slow_first)
    engine = OpenAIEngine(server.address, rows=3)
    stop = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    found = list(engine.complete([Prompt(f"p{index}") for index in range(6)], Sampling(max_tokens=9, stop=stop)))
    assert [one.text for one in found] == [f"<p{index}>" for index in range(6)]
    assert {one.finish for one in found} == {"stop"}
    path, body = server.asked[0]
    assert path == "/v1/completions"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("small", 9, 0.0)
    assert len(body["stop"]) == 4  # what every server takes


def test_no_more_requests_at_once_than_rows(serve: Callable[[Answer], Server]) -> None:
    def slow(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.1)
        return echo(path, body)

    server = serve(slow)
    list(OpenAIEngine(server.address, rows=3).complete([Prompt(str(one)) for one in range(12)], Sampling(1)))
    assert server.most_at_once == 3


def test_samples_have_seeds_of_their_own(serve: Callable[[Answer], Server]) -> None:
    server = serve(echo)
    sampling = Sampling(max_tokens=1, temperature=1.0, samples=3, seed=4)
    list(OpenAIEngine(server.address).complete([Prompt("a"), Prompt("b")], sampling))
    seeds = [body["seed"] for _, body in server.asked]
    assert len(set(seeds)) == 6
    assert all(0 <= seed < 2**31 for seed in seeds)
    again = serve(echo)
    list(OpenAIEngine(again.address).complete([Prompt("a"), Prompt("b")], sampling))
    assert sorted(body["seed"] for _, body in again.asked) == sorted(seeds)


def test_chats_are_rendered_by_the_server(serve: Callable[[Answer], Server], monkeypatch: pytest.MonkeyPatch) -> None:
    def chat(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return 200, {"choices": [{"message": {"content": path}, "finish_reason": "stop"}]}

    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = serve(chat)
    prompt = Prompt("<|user|>hi", True, ({"role": "user", "content": "hi"},))
    (found,) = OpenAIEngine(server.address, chat=True, model="large").complete([prompt], Sampling(5))
    assert (found.text, found.finish) == ("/v1/chat/completions", "stop")
    assert server.asked[0][1]["messages"] == [{"role": "user", "content": "hi"}]
    assert server.asked[0][1]["model"] == "large"
    assert server.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("failure", [(503, {"error": "loading"}), (429, {}), (200, b"no json")])
def test_what_may_pass_is_tried_again_with_growing_waits(
    failure: tuple[int, Any], serve: Callable[[Answer], Server]
) -> None:
    answers = iter([failure, failure, failure])
    waits: list[float] = []
    server = serve(lambda path, body: next(answers, None) or echo(path, body))
    engine = OpenAIEngine(server.address, sleep=waits.append)
    (found,) = engine.complete([Prompt("p")], Sampling(1))
    assert found.text.startswith("<p>")
    assert len(server.asked) == 4
    assert [0.25 * 2**step <= wait <= 0.5 * 2**step for step, wait in enumerate(waits)] == [True] * 3


def test_what_will_not_pass_is_told_at_once(serve: Callable[[Answer], Server]) -> None:
    server = serve(lambda path, body: (400, {"error": "context too long"}))
    with pytest.raises(EngineError, match=r"HTTP 400.*context too long"):
        list(OpenAIEngine(server.address).complete([Prompt("p")], Sampling(1)))
    assert len(server.asked) == 1


def test_attempts_end(serve: Callable[[Answer], Server]) -> None:
    server = serve(lambda path, body: (500, {}))
    with pytest.raises(EngineError, match="HTTP 500"):
        list(OpenAIEngine(server.address, attempts=3, sleep=lambda _: None).complete([Prompt("p")], Sampling(1)))
    assert len(server.asked) == 3


def test_a_hanging_server_is_given_up(serve: Callable[[Answer], Server]) -> None:
    def hang(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.5)
        return echo(path, body)

    server = serve(hang)
    engine = OpenAIEngine(server.address, timeout=0.1, attempts=2, sleep=lambda _: None)
    with pytest.raises(EngineError, match="timed out"):
        list(engine.complete([Prompt("p")], Sampling(1)))
    time.sleep(0.5)  # the handler's broken pipe is its own


def test_nothing_there_and_no_such_model_are_told(serve: Callable[[Answer], Server]) -> None:
    with pytest.raises(EngineError, match="refused"):
        OpenAIEngine("http://127.0.0.1:9/v1", attempts=1)
    with pytest.raises(UsageError, match="no http address"):
        OpenAIEngine("localhost:8000")
    with pytest.raises(EngineError, match="serves small, large, not huge"):
        OpenAIEngine(serve(echo).address, model="huge")


def test_echoed_prompts_give_likelihoods(serve: Callable[[Answer], Server]) -> None:
    def score(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        assert body["echo"] is True
        logprobs = [None, *(-0.5 * one for one in body["prompt"][1:]), -9.0]  # the last one was generated
        return 200, {"choices": [{"text": "", "logprobs": {"token_logprobs": logprobs}}]}

    found = list(OpenAIEngine(serve(score).address).likelihoods([[1, 2, 3], [4, 6]]))
    np.testing.assert_array_equal(np.concatenate(found), np.array([-1.0, -1.5, -3.0], dtype=np.float32))


def test_a_server_that_does_not_echo_is_told_apart(serve: Callable[[Answer], Server]) -> None:
    engine = OpenAIEngine(serve(lambda path, body: (200, {"choices": [{"text": "x", "logprobs": None}]})).address)
    with pytest.raises(UsageError, match="does not echo"):
        list(engine.likelihoods([[1, 2]]))
    with pytest.raises(UsageError, match="whole distributions"):
        engine.logits([[1, 2]])
