"""``qconv quantize`` as a user meets it: results, folders that are not ours, signals, terminals."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path

import pytest

from qconv.artifacts.build import Build
from qconv.cli.signals import Interrupts
from qconv.errors import Interrupted
from qconv.folders.journal import JOURNAL_NAME, WORK_FOLDER, locked
from tests.cli.conftest import Invoke, Start

CALIBRATED = ("--fmt", "awq", "--method", "awq", "--group-size", 32, "--tokens", 256, "--sequence-length", 64)
ROUNDED = ("--fmt", "w4a16", "--method", "rtn", "--group-size", 32)
DEADLINE = 120.0
"""Seconds after which a process is taken to hang; on a busy machine importing torch alone takes ten."""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def committed(out: Path) -> list[str]:
    try:
        lines = (out / WORK_FOLDER / JOURNAL_NAME).read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    records = [json.loads(line) for line in lines]
    return [record["unit"] for record in records if record["kind"] == "unit"]


def test_the_result_tells_path_size_bits_error_memory_and_time(invoke: Invoke, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke("quantize", small, "-o", out, *CALIBRATED)
    assert result.exit_code == 0, result.stderr
    for text in (
        str(out),
        "bits per weight",
        "least SNR",
        "error        squared, in percent: ",
        " in layer ",
        "page         qconv inspect",
        "tokens per expert",
        "without tokens",
        "kept plain rounding",
        "peak memory",
        "time",
    ):
        assert text in result.stdout
    # The plan and one line for each of scales, embeddings, eight layers, head and the end, on stderr with the time.
    lines = result.stderr.splitlines()
    assert all(re.match(r"\[\d+:\d\d:\d\d\] ", line) for line in lines)
    assert sum("% done" in line for line in lines) == 12
    assert sum(line.partition("] ")[2].startswith("plan: awq to awq, 4 bits") for line in lines) == 1
    assert "\x1b" not in result.output
    assert "\r" not in result.output

    again = invoke("quantize", small, "-o", out, *CALIBRATED)
    assert again.exit_code == 0
    assert "already complete" in again.stdout


def test_json_is_all_there_is(invoke: Invoke, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke("quantize", small, "-o", out, *ROUNDED, "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    values = json.loads(result.stdout)
    assert values["path"] == str(out)
    assert values["coverage"] is None
    assert values["peak_memory_bytes"] > 10**7
    # 4 bits and a 16-bit scale for each 32 weights, and the 16 bytes that weight_shape adds to each linear.
    assert 4.5 < values["quantized_bits_per_weight"] < 4.6
    assert values["bytes"] == sum(len(data) for data in contents(out).values())
    assert json.loads(invoke("quantize", small, "-o", out, *ROUNDED, "--json").stdout)["already_complete"] is True


def test_given_options_replace_the_recipes_keys_and_skip_adds(invoke: Invoke, small: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("format: w4a16\nmethod: awq\ngrid: {group_size: 64}\nskip: ['*.0.self_attn.*']\n")
    out = tmp_path / "out"
    options = ("--method", "rtn", "--group-size", 32, "--skip", "*.1.self_attn.*")
    assert invoke("quantize", small, "-o", out, "--recipe", recipe, *options).exit_code == 0
    build = Build.open(out)
    layers = build.architecture.layers
    assert build.grid_of(layers[-1].heads.q).group_size == 32
    assert [build.is_quantized(layer.heads.q) for layer in layers] == [False, False] + [True] * 6


def test_a_foreign_folder_is_refused_and_left_alone(invoke: Invoke, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for options in ((), ("--restart",)):
        result = invoke("quantize", small, "-o", out, *ROUNDED, *options)
        assert result.exit_code == 1
        assert str(out) in result.stderr
        assert contents(out) == {"thesis.txt": b"years of work"}


def test_somebodys_model_is_never_replaced(invoke: Invoke, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    for options in ((), ("--restart",)):
        refused = invoke("quantize", small, "-o", out, *ROUNDED, *options)
        assert refused.exit_code == 1
        assert "config.json" in refused.stderr
        assert contents(out) == {"config.json": b"{}"}


def test_a_restart_that_cannot_begin_leaves_the_build(invoke: Invoke, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert invoke("quantize", small, "-o", out, *ROUNDED).exit_code == 0
    before = contents(out)
    wrong = (
        ("--fmt", "awq", "--calib", f"text:{tmp_path / 'absent'}"),
        ("--fmt", "gguf:Q8_0", "--calib", f"text:{tmp_path / 'absent'}"),
        ("--fmt", "w4a16", "--group-size", "7"),
    )
    for options in wrong:
        assert invoke("quantize", small, "-o", out, *options, "--restart").exit_code == 2
        assert contents(out) == before
    assert invoke("imatrix", small, "-o", out, "--calib", f"text:{tmp_path / 'absent'}", "--restart").exit_code == 2
    assert invoke("quantize", tmp_path / "absent", "-o", out, *ROUNDED, "--restart").exit_code == 2
    assert contents(out) == before


def test_another_recipe_for_a_finished_build_is_stale(invoke: Invoke, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert invoke("quantize", small, "-o", out, *ROUNDED).exit_code == 0
    before = contents(out)
    result = invoke("quantize", small, "-o", out, *ROUNDED[:-1], 64)
    assert result.exit_code == 5
    assert "recipe changed" in result.stderr
    assert contents(out) == before


def test_a_folder_that_is_in_use_is_refused(invoke: Invoke, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    # The lock belongs to whoever opened the folder, not to the process: this one is kept out like any other.
    with locked(out):
        result = invoke("quantize", small, "-o", out, *ROUNDED)
    assert result.exit_code == 1
    assert "another qconv process" in result.stderr
    assert list(out.iterdir()) == []


def test_signals_leave_a_folder_that_is_continued_to_the_same_bytes(
    invoke: Invoke, start: Start, small: Path, tmp_path: Path
) -> None:
    out, reference = tmp_path / "out", tmp_path / "reference"
    assert invoke("quantize", small, "-o", reference, *CALIBRATED).exit_code == 0
    reached = 0
    for number, units, options in ((signal.SIGINT, 2, ()), (signal.SIGTERM, 4, ("--json",))):
        process = start("quantize", small, "-o", out, *CALIBRATED, *options)
        end = time.monotonic() + DEADLINE
        while len(committed(out)) < units and process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        process.send_signal(number)
        result, log = process.communicate(timeout=DEADLINE)
        assert process.returncode == 128 + number, log
        remedy = f"Run the same command again to continue {out}."
        if options:
            assert all("is left to torch" in line for line in log.splitlines())  # where there is no compiler
            told = {"kind": "Interrupted", "message": "interrupted", "hint": remedy, "exit_code": 128 + number}
            assert json.loads(result) == {"error": told}
        else:
            assert result == ""
            assert log.splitlines()[-2:] == ["error: interrupted", f"hint: {remedy}"]
            assert "Traceback" not in log
        assert not list(out.rglob("*.partial"))
        # It went on from where it was, and was stopped before it was done.
        assert reached < len(committed(out)) < 10
        reached = len(committed(out))
        assert invoke("verify", out).exit_code == 5
        assert "unfinished" in invoke("inspect", out).stderr
    assert invoke("quantize", small, "-o", out, *CALIBRATED).exit_code == 0
    assert contents(out) == contents(reference)


def test_a_signal_that_was_swallowed_comes_back() -> None:
    interrupts = Interrupts()
    before = signal.getsignal(signal.SIGTERM)
    with interrupts.installed():
        interrupts.check()
        with contextlib.suppress(Exception):  # as code that is not ours does
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted) as caught:
            interrupts.check()
        assert caught.value.exit_code == 143
        # The next one ends the process without waiting for any cleanup.
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is before


def on_a_terminal(start: Start, columns: int, *arguments: object, **environment: str) -> tuple[int, str]:
    """Exit code and output of the command on a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process: subprocess.Popen[str] = start(
        *arguments, stdin=theirs, stdout=theirs, stderr=theirs, env={"TERM": "xterm-256color", **environment}
    )
    os.close(theirs)
    output = b""
    try:
        while block := os.read(ours, 65536):
            output += block
    except OSError:  # how Linux reports that the other side is closed
        pass
    os.close(ours)
    return process.wait(DEADLINE), output.decode()


def test_a_narrow_terminal_has_a_bar_of_one_line_and_without_color_if_so_asked(
    start: Start, small: Path, tmp_path: Path
) -> None:
    code, output = on_a_terminal(start, 40, "quantize", small, "-o", tmp_path / "out", *ROUNDED, NO_COLOR="1")
    assert code == 0, output
    frames = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output))
    bars = [frame for frame in frames if " %" in frame]
    assert bars
    assert max(map(len, bars)) <= 40
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h")  # the cursor is shown again
    # Foreground and background colours are the attributes 30 to 49.
    assert not re.search(r"\x1b\[(\d+;)*[34]\d[;m]", output)
