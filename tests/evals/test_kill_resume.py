"""The kill script's own parts: killing by pid, noticing failures, and a comparison that sees every difference."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click
import pytest

from evals.kill_resume import CHECKSUMS, JOURNAL, complete, differences, digests, journalled, run


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_run_is_killed_with_its_children_after_the_delay(tmp_path: Path) -> None:
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {0!r}]); time.sleep(60)"
    late = tmp_path / "late"
    code = child.format(f"import time, pathlib; time.sleep(1.5); pathlib.Path({str(late)!r}).touch()")
    started = time.monotonic()
    assert not run(python(code), tmp_path / "out", tmp_path / "log", kill_after=0.7)
    assert time.monotonic() - started < 30
    time.sleep(1.5)
    assert not late.exists()


def test_a_run_that_finishes_is_no_kill_and_one_that_fails_is_an_error(tmp_path: Path) -> None:
    assert run(python("pass"), tmp_path / "out", tmp_path / "log", kill_after=60)
    with pytest.raises(click.ClickException, match="out: quantize exited with 3") as caught:
        run(python("print('the reason', flush=True); raise SystemExit(3)"), tmp_path / "out", tmp_path / "log")
    assert "the reason" in caught.value.message


def test_journalled_counts_whole_lines(tmp_path: Path) -> None:
    assert journalled(tmp_path) == (0, 0)
    journal = tmp_path / JOURNAL
    journal.parent.mkdir()
    lines = [{"kind": "start"}, {"kind": "unit"}, {"kind": "activations"}, {"kind": "unit"}]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "un')
    assert journalled(tmp_path) == (2, 4)


def test_a_build_is_finished_when_its_checksums_outlive_its_journal(tmp_path: Path) -> None:
    assert not complete(tmp_path)
    (tmp_path / JOURNAL).parent.mkdir()
    (tmp_path / JOURNAL).touch()
    (tmp_path / CHECKSUMS).touch()
    assert not complete(tmp_path)
    (tmp_path / JOURNAL).unlink()
    assert complete(tmp_path)


def test_comparison_sees_missing_added_and_changed_files_in_subfolders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "same").write_bytes(b"same")
        (tmp_path / name / "sub/changed").write_bytes(b"\x00\x01")
    assert differences(digests(tmp_path / "a"), digests(tmp_path / "b")) == []
    (tmp_path / "b/sub/changed").write_bytes(b"\x00\x03")  # one bit
    (tmp_path / "a/missing").touch()
    (tmp_path / "b/.added").touch()
    assert differences(digests(tmp_path / "a"), digests(tmp_path / "b")) == [
        "missing is missing",
        ".added is not in the undisturbed build",
        "sub/changed differs",
    ]
