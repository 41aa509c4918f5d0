"""``qconv generate``: prompts from the command line and from standard input."""

from __future__ import annotations

import json
import shutil
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


def test_it_says_how_tokens_were_chosen_and_what_was_not_applied(invoke: Invoke, build: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(build, tmp_path / "copy"))
    (copy / "generation_config.json").write_text('{"repetition_penalty": 1.5, "do_sample": true, "eos_token_id": 0}')
    arguments = ("--prompt", PROMPT, "--max-tokens", 6)
    plain, told = (json.loads(invoke("generate", path, *arguments, "--json").stdout) for path in (build, copy))
    assert told["completions"] == plain["completions"]
    assert told["settings"]["decoding"] == "greedy"
    assert told["settings"]["repetition_penalty"] == 1.0
    assert told["generation_config_not_applied"] == {"do_sample": True, "repetition_penalty": 1.5}
    shown = invoke("generate", copy, *arguments).stderr
    assert "; greedy" in shown
    assert "not applied of generation_config.json: do_sample True, repetition_penalty 1.5" in shown
    assert "sampled at temperature 0.5" in invoke("generate", copy, *arguments, "--temperature", 0.5).stderr


def test_files_that_libraries_refuse_are_named(invoke: Invoke, build: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(build, tmp_path / "copy"))
    for name, text, option, word in (
        ("generation_config.json", '{"eos_token_id": {"a": 1}}', "--prompt", "generation_config"),
        ("chat_template.jinja", "{{ messages[99].content }}", "--chat", "chat template"),
        ("chat_template.jinja", "{% for a in b %}", "--chat", "chat template"),
        ("tokenizer.json", "{", "--prompt", "tokenizer"),
    ):
        kept = (copy / name).read_bytes() if (copy / name).exists() else None
        (copy / name).write_text(text)
        result = invoke("generate", copy, option, "a", "--max-tokens", 1)
        assert (result.exit_code, word in result.stderr) == (5, True), result.stderr
        (copy / name).unlink() if kept is None else (copy / name).write_bytes(kept)


def test_what_cannot_be_generated(invoke: Invoke, build: Path, tmp_path: Path) -> None:
    assert invoke("generate", build, "--prompt", "a", "--chat", "b").exit_code == 2
    assert invoke("generate", build, "--prompt", "").exit_code == 2
    assert invoke("generate", build, "--prompt", "a", "--backend", "abacus").exit_code == 2
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert invoke("generate", tmp_path / "model.gguf", "--prompt", "a").exit_code == 5


def test_an_unfinished_build_is_called_that(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "build/.qconv").mkdir(parents=True)
    (tmp_path / "build/.qconv/journal.jsonl").write_text('{"kind":"start","fingerprints":{}}\n')
    (tmp_path / "build/model-00001-of-00009.safetensors").touch()
    for arguments in (
        ["generate", str(tmp_path / "build"), "--prompt", "x"],
        ["eval", "run", str(tmp_path / "build"), "--suite", "smoke", "--no-gate", "-o", str(tmp_path / "run")],
    ):
        result = invoke(*arguments)
        assert result.exit_code == 5
        assert "an unfinished build" in result.stderr
