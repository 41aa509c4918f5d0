"""Runs through an endpoint: what it cannot score is named, and the rest of the suite goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qconv.errors import EngineError, IncapableEngineError
from qconv.evaluation.cache import Cache
from qconv.evaluation.record import Run
from qconv.evaluation.run import Request, evaluate
from qconv.evaluation.suites import Suite
from tests.conftest import BUNDLED
from tests.evaluation.engines.test_openai import Server

MOST = 40
"""Tokens that the server scores at once."""


@pytest.fixture
def server() -> Iterator[Server]:
    def score(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        count = len(body["prompt"])
        if count > MOST:
            return 400, {"error": "only short prompts are echoed"}
        return 200, {"choices": [{"text": "", "logprobs": {"token_logprobs": [None] + [-1.0] * count}}]}

    made = Server(score)
    yield made
    made.close()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for number in range(30):
        (tmp_path / f"{number:02}.py").write_text("".join(f"value_{one} = {number}\n" for one in range(40)))
    return tmp_path


def task(name: str, corpus: Path, context: int) -> dict[str, Any]:
    values = {"kind": "text", "name": name, "corpus": f"text:{corpus}", "context": context, "stride": context // 2}
    return {**values, "tokens": 500, "document_tokens": 100}


def run(server: Server, build: Path, folder: Path, tasks: list[dict[str, Any]]) -> Run:
    suite = Suite.model_validate({"engine": {"rows": 4}, "noise": None, "tasks": tasks})
    engine = f"openai:{server.address}"
    request = Request(build, None, suite, "small", folder / "run", Cache(folder / "cache"), engine=engine)
    return evaluate(request, progress=lambda *_: None, log=lambda _: None)


def test_what_cannot_be_scored_is_named_and_the_rest_goes_on(server: Server, corpus: Path, tmp_path: Path) -> None:
    found = run(server, BUNDLED, tmp_path, [task("long", corpus, 64), task("short", corpus, 32)])
    (left_out,) = found.unmeasured
    assert left_out.name == "long"
    assert "cannot score prompts: it refuses (HTTP 400: " in left_out.reason
    assert found.tasks[0].metrics["ppl"].value == pytest.approx(2.71828, rel=1e-4)  # e to the 1 nat of each token


def test_a_suite_of_nothing_else_ends_with_1(server: Server, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot score prompts") as caught:
        run(server, BUNDLED, tmp_path, [task("long", corpus, 64)])
    assert caught.value.exit_code == 1


def test_a_model_without_files_here_has_no_tokens(server: Server, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(IncapableEngineError, match="no tokenizer to make the endpoint's tokens"):
        run(server, Path("served"), tmp_path, [task("short", corpus, 32)])
