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

from qconv.errors import EngineError, UnscorableError, UsageError
from qconv.evaluation.engines.base import Prompt, Sampling
from qconv.evaluation.engines.openai import PINNED, OpenAIEngine

ODD_CHOICES: list[Any] = [None, [], [5], [None], {"a": 1}, "abc", [{}], [{"text": 5}]]
ODD_MESSAGES: list[Any] = [None, "x", {"content": 5}, {"content": [1]}]
Answer = Callable[[str, dict[str, Any]], tuple[int, Any]]


SERVED = {"data": [{"id": "small"}, {"id": "large"}]}


class Server:
    """Answers by a function of path and body; keeps what it was asked."""

    def __init__(self, answer: Answer, models: Any = SERVED) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = self.most_at_once = 0
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send(200, models)

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
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(answer: Answer, models: Any = SERVED) -> Server:
        servers.append(Server(answer, models))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def echo(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    return 200, {"choices": [{"text": f"<{body['prompt']}>\nclass X", "finish_reason": "length"}]}


def test_completions_come_in_order_and_stop_here_if_the_server_does_not(serve: Callable[..., Server]) -> None:
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


def test_no_more_requests_at_once_than_rows(serve: Callable[..., Server]) -> None:
    def slow(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.1)
        return echo(path, body)

    server = serve(slow)
    list(OpenAIEngine(server.address, rows=3).complete([Prompt(str(one)) for one in range(12)], Sampling(1)))
    assert server.most_at_once == 3


def test_samples_have_seeds_of_their_own(serve: Callable[..., Server]) -> None:
    server = serve(echo)
    sampling = Sampling(max_tokens=1, temperature=1.0, samples=3, seed=4)
    list(OpenAIEngine(server.address).complete([Prompt("a"), Prompt("b")], sampling))
    seeds = [body["seed"] for _, body in server.asked]
    assert len(set(seeds)) == 6
    assert all(0 <= seed < 2**31 for seed in seeds)
    again = serve(echo)
    list(OpenAIEngine(again.address).complete([Prompt("a"), Prompt("b")], sampling))
    assert sorted(body["seed"] for _, body in again.asked) == sorted(seeds)


def test_chats_are_rendered_by_the_server(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
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
    failure: tuple[int, Any], serve: Callable[..., Server]
) -> None:
    answers = iter([failure, failure, failure])
    waits: list[float] = []
    server = serve(lambda path, body: next(answers, None) or echo(path, body))
    engine = OpenAIEngine(server.address, sleep=waits.append)
    (found,) = engine.complete([Prompt("p")], Sampling(1))
    assert found.text.startswith("<p>")
    assert len(server.asked) == 4
    assert [0.25 * 2**step <= wait <= 0.5 * 2**step for step, wait in enumerate(waits)] == [True] * 3


def test_what_will_not_pass_is_told_at_once(serve: Callable[..., Server]) -> None:
    server = serve(lambda path, body: (404, {"error": "no such model"}))
    with pytest.raises(EngineError, match=r"HTTP 404.*no such model"):
        list(OpenAIEngine(server.address).complete([Prompt("p")], Sampling(1)))
    assert len(server.asked) == 1


def test_attempts_end(serve: Callable[..., Server]) -> None:
    server = serve(lambda path, body: (500, {}))
    with pytest.raises(EngineError, match="HTTP 500"):
        list(OpenAIEngine(server.address, attempts=3, sleep=lambda _: None).complete([Prompt("p")], Sampling(1)))
    assert len(server.asked) == 3


def test_a_hanging_server_is_given_up(serve: Callable[..., Server]) -> None:
    def hang(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.5)
        return echo(path, body)

    server = serve(hang)
    engine = OpenAIEngine(server.address, timeout=0.1, attempts=2, sleep=lambda _: None)
    with pytest.raises(EngineError, match="timed out"):
        list(engine.complete([Prompt("p")], Sampling(1)))
    time.sleep(0.5)  # the handler's broken pipe is its own


def test_nothing_there_and_no_such_model_are_told(serve: Callable[..., Server]) -> None:
    with pytest.raises(EngineError, match="refused"):
        OpenAIEngine("http://127.0.0.1:9/v1", attempts=1)
    with pytest.raises(UsageError, match="no http address"):
        OpenAIEngine("localhost:8000")
    with pytest.raises(EngineError, match="serves small, large, not huge"):
        OpenAIEngine(serve(echo).address, model="huge")


def test_echoed_prompts_give_likelihoods(serve: Callable[..., Server]) -> None:
    def score(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        assert body["echo"] is True
        logprobs = [None, *(-0.5 * one for one in body["prompt"][1:]), -9.0]  # the last one was generated
        return 200, {"choices": [{"text": "", "logprobs": {"token_logprobs": logprobs}}]}

    found = list(OpenAIEngine(serve(score).address).likelihoods([[1, 2, 3], [4, 6]]))
    np.testing.assert_array_equal(np.concatenate(found), np.array([-1.0, -1.5, -3.0], dtype=np.float32))


def scoring(values: Any, **more: Any) -> Answer:
    return lambda path, body: (200, {"choices": [{"text": "", "logprobs": {"token_logprobs": values}}], **more})


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ([None, 5.0, -1.0, -1.0], "gives '5.0' where a log-probability"),
        ([None, -1.0, float("nan"), -1.0], "gives 'nan'"),
        ([None, -1.0, float("-inf"), -1.0], "gives '-inf'"),
        ([None, -1.0, None, -1.0], "gives 'None'"),
        ([None, -1.0, "-1.0", -1.0], "gives '-1.0'"),
        ([None, True, False, True], "gives 'True'"),
        ([None, -1e308, -1.0, -1.0], r"gives '-1e\+308'"),
        ([None, 0.0, 0.0, -1.0], "every token the log-probability 0"),  # the last one was generated
        ([None, -9.0, -1.0, -1.0, -1.0], "of 3 tokens it gives 5"),  # a BOS of the server's own
        ([None, -1.0], "of 3 tokens it gives 2"),
        ([None, None, None, None], "does not echo"),
        ([], "does not echo"),
        ({"a": 1}, "does not echo"),
    ],
)
def test_impossible_log_probabilities_are_no_perplexity(
    values: Any, problem: str, serve: Callable[..., Server]
) -> None:
    engine = OpenAIEngine(serve(scoring(values)).address)
    with pytest.raises(UnscorableError, match=problem):
        list(engine.likelihoods([[1, 2, 3]]))


def test_a_server_that_counts_other_tokens_scores_other_tokens(serve: Callable[..., Server]) -> None:
    """As many values as asked for, but shifted by a BOS: only the server's count tells."""
    values = [None, -1.0, -2.0, -3.0]
    with pytest.raises(UnscorableError, match="counts 4 tokens"):
        list(OpenAIEngine(serve(scoring(values, usage={"prompt_tokens": 4})).address).likelihoods([[1, 2, 3]]))
    (found,) = OpenAIEngine(serve(scoring(values, usage={"prompt_tokens": 3})).address).likelihoods([[1, 2, 3]])
    np.testing.assert_array_equal(found, [-1.0, -2.0])


def test_rounding_above_certainty_is_certainty(serve: Callable[..., Server]) -> None:
    (found,) = OpenAIEngine(serve(scoring([None, 1e-7, -1.0])).address).likelihoods([[1, 2, 3]])
    np.testing.assert_array_equal(found, [0.0, -1.0])


def test_a_server_that_does_not_echo_is_told_apart(serve: Callable[..., Server]) -> None:
    engine = OpenAIEngine(serve(lambda path, body: (200, {"choices": [{"text": "x", "logprobs": None}]})).address)
    with pytest.raises(UnscorableError, match="does not echo"):
        list(engine.likelihoods([[1, 2]]))
    engine = OpenAIEngine(serve(lambda path, body: (400, {"error": "Only no echo is supported"})).address)
    with pytest.raises(UnscorableError, match=r"refuses .*Only no echo"):
        list(engine.likelihoods([[1, 2]]))
    with pytest.raises(UsageError, match="whole distributions"):
        engine.logits([[1, 2]])


def test_a_server_that_is_gone_is_not_one_that_cannot_score(serve: Callable[..., Server]) -> None:
    engine = OpenAIEngine(serve(lambda path, body: (500, {})).address, attempts=1)
    with pytest.raises(EngineError) as caught:
        list(engine.likelihoods([[1, 2]]))
    assert not isinstance(caught.value, UnscorableError)


def test_greedy_is_greedy_whatever_the_model_recommends(serve: Callable[..., Server]) -> None:
    server = serve(echo)
    engine = OpenAIEngine(server.address)
    list(engine.complete([Prompt("p")], Sampling(1)))
    sent = server.asked[0][1]
    assert {name: sent[name] for name in PINNED} == PINNED
    assert (sent["temperature"], sent["top_p"]) == (0.0, 1.0)
    assert engine.refused == ()


@pytest.mark.parametrize("names_it", [True, False])
def test_a_field_that_a_server_refuses_is_left_out_and_told(names_it: bool, serve: Callable[..., Server]) -> None:
    def strict(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if "repeat_penalty" in body:
            return 400, {"error": "unknown field" + (' "repeat_penalty"' if names_it else "")}
        return echo(path, body)

    server = serve(strict)
    engine = OpenAIEngine(server.address, rows=1)
    list(engine.complete([Prompt("a"), Prompt("b")], Sampling(1)))
    assert engine.refused == (("repeat_penalty",) if names_it else tuple(PINNED))
    assert len(server.asked) == 3  # the second prompt knows
    assert ("repetition_penalty" in server.asked[-1][1]) is names_it


def test_a_request_that_is_wrong_itself_is_told_as_the_server_told_it_first(
    serve: Callable[..., Server],
) -> None:
    server = serve(lambda path, body: (400, {"error": "too long" if "top_k" in body else "other"}))
    engine = OpenAIEngine(server.address)
    with pytest.raises(EngineError, match=r"HTTP 400.*too long"):
        list(engine.complete([Prompt("p")], Sampling(1)))
    assert engine.refused == ()


@pytest.mark.parametrize(
    ("chat", "choice", "text"),
    [
        (False, {"text": None}, ""),
        (False, {"text": "a\ud800b"}, "a\ufffdb"),
        (False, {"text": "\ud83d\ude00"}, "\U0001f600"),
        (False, {"text": "x", "finish_reason": ["length"]}, "x"),
        (True, {"message": {"content": None, "reasoning_content": "hm"}}, ""),
        (True, {"message": {"content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]}}, "xy"),
    ],
)
def test_odd_answers_are_read(chat: bool, choice: Any, text: str, serve: Callable[..., Server]) -> None:
    engine = OpenAIEngine(serve(lambda path, body: (200, {"choices": [choice]})).address, chat=chat)
    (found,) = engine.complete([Prompt("p")], Sampling(1))
    assert found.text == text
    found.text.encode()


@pytest.mark.parametrize(
    ("chat", "answer"),
    [
        *((False, {"choices": choices}) for choices in ODD_CHOICES),
        *((False, value) for value in ([1], None, "x", {}, {"choices": [{"text": ["a"]}]})),
        *((True, {"choices": [{"message": message}]}) for message in ODD_MESSAGES),
        (True, {"choices": [{"text": "x"}]}),
    ],
)
def test_answers_of_another_form_are_errors(chat: bool, answer: Any, serve: Callable[..., Server]) -> None:
    server = serve(lambda path, body: (200, answer))
    with pytest.raises(EngineError, match="holds no"):
        list(OpenAIEngine(server.address, chat=chat).complete([Prompt("p")], Sampling(1)))
    assert len(server.asked) == 1


@pytest.mark.parametrize("models", [[1], None, "x", {"models": []}, {"data": [{}]}, {"data": [{"id": 5}]}])
def test_a_list_of_models_of_another_form_is_an_error(models: Any, serve: Callable[..., Server]) -> None:
    with pytest.raises(EngineError, match="no list of models"):
        OpenAIEngine(serve(echo, models).address)


def test_what_the_server_puts_before_a_text_is_not_sent(serve: Callable[..., Server]) -> None:
    server = serve(echo)
    list(OpenAIEngine(server.address).complete([Prompt("<s>hi", True, bos="<s>"), Prompt("<s>hi")], Sampling(1)))
    assert sorted(body["prompt"] for _, body in server.asked) == ["<s>hi", "hi"]
