"""The way out of the process: help without torch, exit codes, messages, streams that are gone."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from qconv.cli.main import COMMANDS, as_qconv_error, qconv
from qconv.errors import CheckpointError, OutputError, ResourceError, UsageError
from tests.cli.conftest import REPOSITORY, Invoke, Start


def test_help_lists_every_command_and_imports_no_torch() -> None:
    program = (
        "import contextlib, io, sys\n"
        "from click.testing import CliRunner\n"
        "from qconv.cli.main import COMMANDS, qconv\n"
        "for arguments in [], *([name] for name in COMMANDS), ['bench', 'slice']:\n"
        "    result = CliRunner().invoke(qconv, [*arguments, '--help'])\n"
        "    assert result.exit_code == 0, result.output\n"
        "    print(result.output)\n"
        "assert 'torch' not in sys.modules\n"
        "assert 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    listed = done.stdout.partition("Commands:")[2].splitlines()[1 : len(COMMANDS) + 1]
    assert [line.split()[0] for line in listed] == list(COMMANDS)
    # Each has a line of its own that was not cut off.
    assert not any(line.endswith("...") for line in listed)


def test_no_command_prints_the_help_and_is_a_usage_error(invoke: Invoke) -> None:
    result = invoke()
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "frobnicate"),
        (["quantize"], "MODEL"),
        (["quantize", "nowhere", "--fmt", "awq"], "--out"),
        (["quantize", "nowhere", "-o", "out"], "awq, "),
        (["quantize", "nowhere", "-o", "out", "--fmt", "awq", "--recipe", "awq"], "--recipe"),
        (["quantize", "nowhere", "-o", "out", "--fmt", "gguf:Q9"], "gguf:Q9"),
        (["quantize", "nowhere", "-o", "out", "--recipe", "no.yaml"], "no.yaml"),
        (["quantize", "nowhere", "-o", "out", "--fmt", "awq", "--method", "magic"], "magic"),
        (["quantize", "nowhere", "-o", "out", "--fmt", "awq", "--tokens", "0"], "--tokens"),
        (["quantize", "nowhere", "-o", "out", "--fmt", "awq", "--tokens", "1000"], "sequence_length"),
        (["quantize", "nowhere", "-o", "out", "--fmt", "awq", "--group-size", "3"], "grid.group_size"),
        (["quantize", "nowhere", "-o", "out", "--fmt", "awq"], "nowhere"),
        (["quantize", "nowhere", "-o", __file__, "--fmt", "awq"], "test_main.py"),
        (["plan", "nowhere", "--fmt", "awq"], "nowhere"),
        (["plan", "nowhere"], "--fmt"),
        (["inspect", "nowhere"], "nowhere"),
        (["inspect", "--layers", "--tensors"], "PATH"),
        (["verify", "nowhere"], "nowhere"),
        (["bench"], "slice"),
        (["bench", "slice", "--layers", "0", "--experts", "1", "-o", "out"], "--layers"),
    ],
)
def test_a_wrong_request_names_what_is_wrong_and_exits_with_2(
    invoke: Invoke, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["quantize", "--json"], "UsageError"),
        (["quantize", "nowhere", "-o", "out", "--fmt", "awq", "--tokens", "1000", "--json"], "RecipeError"),
        (["verify", "nowhere", "--json"], "UsageError"),
    ],
)
def test_with_json_an_error_is_an_object(invoke: Invoke, arguments: list[str], kind: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr == ""
    error = json.loads(result.stdout)["error"]
    assert error["kind"] == kind
    assert error["exit_code"] == 2
    assert error["message"]


def test_error_and_hint_have_a_line_each(invoke: Invoke) -> None:
    error, hint = invoke("plan", "nowhere", "--fmt", "awq").stderr.splitlines()
    assert error == "error: nowhere: no such folder."
    assert hint.startswith("hint: ")


def test_errors_of_the_system_become_ours() -> None:
    missing = as_qconv_error(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "some/file"))
    assert isinstance(missing, OutputError)
    assert missing.message == "some/file: No such file or directory."
    full = as_qconv_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert full is not None
    assert full.hint is not None
    assert isinstance(as_qconv_error(MemoryError()), ResourceError)
    # torch's CPU allocator raises a RuntimeError with this text.
    refused = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
    assert isinstance(as_qconv_error(refused), ResourceError)
    assert isinstance(as_qconv_error(click.BadParameter("bad")), UsageError)
    ours = CheckpointError("damaged")
    assert as_qconv_error(ours) is ours
    assert as_qconv_error(RuntimeError("a bug")) is None
    assert as_qconv_error(BrokenPipeError()) is None


def test_a_bug_gives_a_traceback_and_1(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("qconv.artifacts.inspection.inspect", fail)
    result = invoke("inspect", tmp_path)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "a bug" in result.stderr


def test_a_reader_that_goes_away_is_no_error(start: Start, tiny: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = start("inspect", tiny, stdout=writing)
    os.close(writing)
    _, complaints = process.communicate(timeout=120)
    assert complaints == ""
    assert process.returncode == 141  # 128 + SIGPIPE, as a shell reports any other program


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_stdout_is_told(unbuffered: str, start: Start) -> None:
    """Also where nothing is written before the interpreter ends."""
    with open("/dev/full", "w") as full:
        process = start("--help", stdout=full, env={"PYTHONUNBUFFERED": unbuffered})
        _, complaints = process.communicate(timeout=60)
    assert process.returncode == 1
    assert complaints.startswith("error: No space left on device")
    assert "Exception ignored" not in complaints


def test_the_group_is_what_the_console_script_calls() -> None:
    assert isinstance(qconv, click.Group)
    assert [qconv.get_command(click.Context(qconv), name) is not None for name in COMMANDS] == [True] * len(COMMANDS)
