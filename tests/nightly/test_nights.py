"""The folders of nights: begun in nobody's folder, and removed only where nights alone have written."""

from __future__ import annotations

from pathlib import Path

import pytest

from qconv.errors import OutputError
from qconv.evaluation.run_folder import begin
from qconv.folders.ownership import DISCARDED_NAME, TRASH_NAME, write_own
from qconv.nightly.nights import begin_night, remove_old
from tests.building.test_output import BUILD
from tests.building.test_output import finished as finished_build
from tests.conftest import folder_bytes

KEY = {name: name for name in ("build", "reference", "suite", "engine", "qconv")}


def night(work: Path, date: str) -> Path:
    """A night of one build, a run that was interrupted, and a report."""
    folder = begin_night(work, date)
    finished_build(folder / "a" / "build", *BUILD)
    (folder / "a" / "run-smoke").mkdir()
    begin(folder / "a" / "run-smoke", KEY, restart=False)
    write_own(folder / "report.html", b"<p>")
    return folder


def removed(work: Path, keep: int, tonight: str) -> list[str]:
    """What is said of nights that are to go."""
    said: list[str] = []
    remove_old(work, keep, tonight, said.append)
    return said


def test_the_oldest_nights_go(tmp_path: Path) -> None:
    for day in range(1, 6):
        night(tmp_path, f"2026-01-0{day}")
    said = removed(tmp_path, 2, "2026-01-05")
    assert said == [f"2026-01-0{day}: removed; the history keeps its runs" for day in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2026-01-04", "2026-01-05"]
    assert removed(tmp_path, 2, "2026-01-05") == []


@pytest.mark.parametrize("keep", [1, 2])
def test_a_night_that_is_dated_before_others_stays(tmp_path: Path, keep: int) -> None:
    for date in ("2026-01-01", "2026-02-01", "2026-02-02"):
        night(tmp_path, date)
    removed(tmp_path, keep, "2026-01-01")
    kept = ["2026-01-01", "2026-02-02"][:keep]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_folders_that_no_night_made_stay_and_do_not_count(tmp_path: Path) -> None:
    for year in range(2010, 2020):
        (tmp_path / f"{year}-07-04").mkdir()
        (tmp_path / f"{year}-07-04" / "holiday.jpg").write_bytes(b"mine")
    (tmp_path / "2009-07-04").symlink_to(tmp_path / "2010-07-04", target_is_directory=True)
    before = folder_bytes(tmp_path)
    night(tmp_path, "2026-01-01")
    night(tmp_path, "2026-01-02")
    assert removed(tmp_path, 2, "2026-01-02") == []
    assert removed(tmp_path, 1, "2026-01-02") == ["2026-01-01: removed; the history keeps its runs"]
    assert before.items() <= folder_bytes(tmp_path).items()
    assert (tmp_path / "2009-07-04").is_symlink()


@pytest.mark.parametrize(
    "strange",
    [
        "notes.txt",
        "report.md",
        "a/notes.txt",
        "a/build/notes.txt",
        "a/build/README.md",
        "a/run-smoke/thesis.tex",
        "b/c/d",
    ],
)
def test_a_night_with_something_of_somebodys_stays_whole(tmp_path: Path, strange: str) -> None:
    folder = night(tmp_path, "2026-01-01")
    (folder / strange).parent.mkdir(parents=True, exist_ok=True)
    (folder / strange).write_bytes(b"mine")
    before = folder_bytes(tmp_path)
    (said,) = removed(tmp_path, 1, "2026-01-02")
    assert "kept: it holds" in said
    assert strange.split("/")[0] in said
    assert folder_bytes(tmp_path) == before


def test_a_removal_that_was_killed_is_finished_by_the_next_night(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = night(tmp_path, "2026-01-01")

    class Killed(Exception):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("qconv.folders.ownership.sync_folder", kill)  # all is moved, nothing removed
        with pytest.raises(Killed):
            remove_old(tmp_path, 1, "2026-01-02", lambda _: None)
    assert [path.name for path in folder.iterdir()] == [TRASH_NAME]
    with monkeypatch.context() as patch:
        patch.setattr("qconv.folders.ownership._empty", kill)  # given up, nothing removed
        with pytest.raises(Killed):
            remove_old(tmp_path, 1, "2026-01-02", lambda _: None)
    assert [path.name for path in folder.iterdir()] == [DISCARDED_NAME]
    assert removed(tmp_path, 1, "2026-01-02") == ["2026-01-01: removed; the history keeps its runs"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["holiday.jpg", "report.html", "a/build/config.json"])
def test_no_night_begins_in_somebodys_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "2026-01-01" / name).parent.mkdir(parents=True)
    (tmp_path / "2026-01-01" / name).write_bytes(b"mine")
    before = folder_bytes(tmp_path)
    with pytest.raises(OutputError, match="something else than a night"):
        begin_night(tmp_path, "2026-01-01")
    assert folder_bytes(tmp_path) == before


def test_a_night_is_begun_once(tmp_path: Path) -> None:
    (tmp_path / "2026-01-01").mkdir()
    before = folder_bytes(begin_night(tmp_path, "2026-01-01"))
    assert folder_bytes(begin_night(tmp_path, "2026-01-01")) == before
