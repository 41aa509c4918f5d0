"""Evaluations beside llama.cpp: its perplexity on its own tokens and logits, and its server's OpenAI endpoint."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qconv.calibration.documents import documents
from qconv.errors import EngineError, UnscorableError
from qconv.evaluation.artifacts import identify
from qconv.evaluation.cache import Cache
from qconv.evaluation.engines.base import Prompt, Sampling
from qconv.evaluation.engines.llamacpp import INTERPRETER_VARIABLE, LlamaCppEngine
from qconv.evaluation.engines.local import LocalEngine
from qconv.evaluation.kept_files import load_json
from qconv.evaluation.record import Run
from qconv.evaluation.run import Request, evaluate
from qconv.evaluation.suites import Suite
from tests.interop import environments
from tests.interop.conftest import MODEL, Client
from tests.interop.test_gguf import write

pytestmark = pytest.mark.interop

PROMPTS = [Prompt("def add(a, b):\n    return"), Prompt("import os\nimport"), Prompt("class A:\n    def")]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (file,) = write(MODEL, tmp_path_factory.mktemp("f16") / "f16", "F16")
    return file


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About ten windows of source code."""
    path = tmp_path_factory.mktemp("text") / "text.py"
    parts = ["".join(document.pieces()) for document, _ in zip(documents("python-stdlib", 7), range(3), strict=False)]
    path.write_text("".join(parts)[:16_000])
    return path


def run(build: Path, out: Path, suite: dict[str, Any], **options: Any) -> Run:
    request = Request(
        build=build, suite=Suite.model_validate(suite), suite_name="interop", out=out, cache=Cache(out / "c"), **options
    )
    return evaluate(request, restart=True, progress=lambda *_: None, log=lambda _: None)


@pytest.mark.parametrize("file_type", ["F16", "Q4_K_M"])
@pytest.mark.parametrize("engine", ["local", "llamacpp"])
def test_perplexity_is_llama_cpps(
    engine: str, file_type: str, text: Path, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = write(MODEL, tmp_path / "gguf", file_type)
    client("llamacpp", "llamacpp_perplexity", file, text, tmp_path / "answer.json")
    theirs = json.loads((tmp_path / "answer.json").read_text())
    monkeypatch.setenv(INTERPRETER_VARIABLE, str(environments.interpreter("llamacpp")))
    task = {"kind": "text", "name": "text", "rule": "llama.cpp", "corpus": f"text:{text}", "tokens": 10**6}
    ours = run(file, tmp_path / "run", {"noise": None, "tasks": [task]}, reference=None, engine=engine)
    items = ours.tasks[0].items
    assert sum(item.values["tokens"] for item in items) == theirs["count"]
    value = ours.tasks[0].metrics["ppl"].value
    assert value is not None
    assert value == pytest.approx(theirs["ppl"], rel=1e-3)


def test_logits_and_completions_are_those_of_the_local_engine(gguf: Path) -> None:
    engine = LlamaCppEngine(gguf, interpreter=environments.interpreter("llamacpp"))
    local = LocalEngine(gguf, dtype="float32")
    sequences = [list(range(100, 140)), list(range(300, 307))]
    for ours, theirs in zip(engine.logits(sequences), local.logits(sequences), strict=True):
        assert ours.shape == theirs.shape
        # llama.cpp rounds activations to float16 beside F16 weights.
        assert np.abs(ours - theirs).max() < 0.05
    greedy = Sampling(max_tokens=16)
    assert [one.text for one in engine.complete(PROMPTS, greedy)] == [
        one.text for one in local.complete(PROMPTS, greedy)
    ]
    drawn = Sampling(max_tokens=6, temperature=1.0, samples=2, seed=1)
    first = [one.tokens for one in engine.complete(PROMPTS, drawn)]
    assert first == [one.tokens for one in engine.complete(PROMPTS, drawn)]
    assert len(set(first)) > 3
    assert "xllamacpp" in engine.identity
    engine.close()


def test_a_file_that_llama_cpp_refuses_is_an_error_with_its_reason(gguf: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf.read_bytes()[:10_000])
    engine = LlamaCppEngine(broken, interpreter=environments.interpreter("llamacpp"))
    with pytest.raises(EngineError, match=r"llama\.cpp ended"):
        list(engine.logits([[1, 2, 3]]))


@pytest.fixture
def server(gguf: Path) -> Iterator[str]:
    """The address of llama.cpp's server on loopback."""
    command = [str(environments.interpreter("llamacpp")), "-m", "tests.interop.clients.llamacpp_server", str(gguf)]
    with subprocess.Popen(
        command, cwd=environments.CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        yield process.stdout.readline().decode().strip() + "/v1"
        process.stdin.close()
        process.kill()


def texts(folder: Path, found: Run) -> dict[str, str]:
    """Each problem's answer."""
    rows: Any = load_json(folder, found.tasks[0].files["answers"])
    return {row["problem"]: row["build"]["text"] for row in rows}


def test_a_run_through_a_real_servers_endpoint(server: str, gguf: Path, tmp_path: Path) -> None:
    """HumanEval through llama.cpp's server, beside the same file in qconv's runtime."""
    suite = {"tasks": [{"kind": "humaneval", "name": "humaneval", "problems": 8, "max_tokens": 160}]}
    served = run(gguf, tmp_path / "served", suite, reference=None, engine=f"openai:{server}")
    local = run(gguf, tmp_path / "local", suite, reference=None)
    assert served.engine["engine"] == "openai"
    assert served.tasks[0].inputs_sha256 == local.tasks[0].inputs_sha256
    answers = [texts(tmp_path / "served", served), texts(tmp_path / "local", local)]
    same = [problem for problem, text in answers[0].items() if text == answers[1][problem]]
    # The server keeps its cache in float16: an answer may differ, most do not.
    assert len(same) >= 6
    passed = served.tasks[0].metrics["pass@1"].value
    assert passed is not None
    assert passed > 0.5  # the model has learnt them


def test_a_chat_through_a_real_servers_endpoint(server: str, gguf: Path, tmp_path: Path) -> None:
    """The server renders the chat by the template in the file, qconv by the same: the answers are the same."""
    task = {"kind": "humaneval", "name": "humaneval", "prompt": "chat", "problems": 6, "max_tokens": 96}
    served = run(gguf, tmp_path / "served", {"tasks": [task]}, reference=None, engine=f"openai-chat:{server}")
    local = run(gguf, tmp_path / "local", {"tasks": [task]}, reference=None)
    assert served.engine["engine"] == "openai-chat"
    assert served.tasks[0].inputs_sha256 == local.tasks[0].inputs_sha256, "prompts are hashed as rendered"
    answers = [texts(tmp_path / "served", served), texts(tmp_path / "local", local)]
    # A server may cut white space off an answer's ends.
    same = [problem for problem, text in answers[0].items() if text.strip() == answers[1][problem].strip()]
    assert len(same) >= 5
    assert any(len(text) > 40 for text in answers[0].values())


def test_a_server_that_does_not_score_prompts_is_told_apart(
    server: str, gguf: Path, text: Path, tmp_path: Path
) -> None:
    """llama.cpp's server gives log-probabilities of what it generates alone: perplexity is refused, not made up."""
    task = {"kind": "text", "name": "text", "rule": "llama.cpp", "corpus": f"text:{text}", "tokens": 1000}
    with pytest.raises(UnscorableError, match="does not echo prompts with log-probabilities") as caught:
        run(gguf, tmp_path / "run", {"noise": None, "tasks": [task]}, reference=None, engine=f"openai:{server}")
    assert "only generates" in str(caught.value.hint)


def test_an_endpoint_without_files_is_known_by_its_address(server: str, tmp_path: Path) -> None:
    suite = {"tasks": [{"kind": "humaneval", "name": "humaneval", "problems": 1, "max_tokens": 32}]}
    found = run(Path("served-model"), tmp_path / "run", suite, reference=None, engine=f"openai:{server}")
    assert (found.build.kind, found.build.name) == ("endpoint", "served-model")
    assert found.verdict.outcome == "not gated"


def test_the_same_file_is_the_same_artifact(gguf: Path, tmp_path: Path) -> None:
    os.link(gguf, tmp_path / gguf.name)
    assert identify(tmp_path / gguf.name).sha256 == identify(gguf).sha256
    assert identify(gguf).kind == "gguf"
