"""The sweep's own parts: a process ends before the change it was told, and what it left is compared as a whole."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from evals import changes


def write(folder: Path) -> None:
    """Six changes: a folder, a file opened, synced and renamed, another file, and the first one removed."""
    (folder / "sub").mkdir()
    with (folder / "one").open("wb") as file:
        file.write(b"1")
        file.flush()
        os.fsync(file.fileno())
    (folder / "one").rename(folder / "two")
    (folder / "three").write_text("3")
    (folder / "two").unlink()


CHANGES = 6
AFTER = [set(), {"sub"}, {"sub", "one"}, {"sub", "one"}, {"sub", "two"}, {"sub", "two", "three"}]
"""What there is before each of them."""


def named(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def test_changes_are_counted_and_none_elsewhere(folder: Path, tmp_path: Path) -> None:
    def work() -> None:
        write(folder)
        (tmp_path / "elsewhere").mkdir()
        (folder / "three").read_text()

    ended = changes.run(work, folder, tmp_path / "log")
    assert (ended.killed, ended.code, ended.changes) == (False, 0, CHANGES)
    assert named(folder) == {"sub", "three"}


@pytest.mark.parametrize("number", range(1, CHANGES + 1))
def test_a_process_ends_before_the_change_that_it_was_told(folder: Path, tmp_path: Path, number: int) -> None:
    ended = changes.run(lambda: write(folder), folder, tmp_path / "log", before=number)
    assert (ended.killed, ended.changes) == (True, number)
    assert named(folder) == AFTER[number - 1]


def test_a_process_ends_after_its_time(folder: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    for after in (0.0, 0.2):  # at once too
        assert changes.run(lambda: time.sleep(60), folder, tmp_path / "log", after=after).killed
    assert time.monotonic() - started < 30


def test_exit_codes_and_what_was_printed_are_kept(folder: Path, tmp_path: Path) -> None:
    def work() -> None:
        print("the reason")
        raise SystemExit(3)

    ended = changes.run(work, folder, tmp_path / "log")
    assert (ended.killed, ended.code) == (False, 3)
    assert (tmp_path / "log").read_text() == "the reason\n"
    assert changes.run(lambda: [][0], folder, tmp_path / "log").code == 1  # an error that nobody caught
    assert "IndexError" in (tmp_path / "log").read_text()
