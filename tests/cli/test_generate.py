"""``qconv generate``: prompts from the command line and from standard input."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from qconv.cli.main import qconv
from tests.cli.conftest import Invoke

PROMPT = "class Node:\n    def __init__(self, value, left=None"


def test_text_goes_to_stdout_and_the_rest_to_stderr(invoke: Invoke, build: Path) -> None:
    given = invoke("generate", build, "--prompt", PROMPT, "--max-tokens", 6)
    assert given.exit_code == 0
    assert "6 tokens in" in given.stderr
    piped = CliRunner().invoke(qconv, ["generate", str(build), "--max-tokens", "6"], input=PROMPT)
    assert piped.stdout == given.stdout != "\n"


def test_a_batch_and_json(invoke: Invoke, build: Path) -> None:
    arguments = ("generate", build, "--chat", "hi", "--chat", "What is a list?", "--max-tokens", 4)
    values = json.loads(invoke(*arguments, "--json").stdout)
    assert [one["prompt"].startswith("<|im_start|>user\n") for one in values["completions"]] == [True, True]
    assert values["tokens"] == sum(one["tokens"] for one in values["completions"])
    shown = invoke(*arguments).stdout
    for one, message in zip(values["completions"], ("hi", "What is a list?"), strict=True):
        assert f"> {message}\n{one['text']}\n" in shown


def test_what_cannot_be_generated(invoke: Invoke, build: Path, tmp_path: Path) -> None:
    assert invoke("generate", build, "--prompt", "a", "--chat", "b").exit_code == 2
    assert invoke("generate", build, "--prompt", "").exit_code == 2
    assert invoke("generate", build, "--prompt", "a", "--backend", "abacus").exit_code == 2
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert invoke("generate", tmp_path / "model.gguf", "--prompt", "a").exit_code == 5
