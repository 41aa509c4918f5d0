"""The history: every run once, found again by what it is, its files kept, its baseline chosen; damage is said."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from pathlib import Path

import pytest

from qconv.errors import ArtifactError, OutputError, UsageError
from qconv.evaluation.history import DATABASE_NAME, History, differences, files_of
from qconv.evaluation.kept_files import load, load_arrays
from qconv.evaluation.record import Run, Verdict
from tests.evaluation.report.conftest import SHA, Write, write  # noqa: F401 - a fixture

PASS = Verdict(outcome="pass", sentence="no regression")


def test_a_run_is_kept_whole_and_outlives_its_folder(tmp_path: Path, write: Write) -> None:  # noqa: F811
    run = write()
    with History.open(tmp_path / "history") as history:
        added = history.add(tmp_path / "run", run)
        assert history.add(tmp_path / "run", run).id == added.id, "the same run again changes nothing"
    arrays = load_arrays(tmp_path / "run", run.tasks[0].files["tokens"])
    shutil.rmtree(tmp_path / "run")
    with History.open(tmp_path / "history", create=False) as history:
        (entry,) = history.runs()
        assert entry.run == run
        assert not entry.accepted, "a regression is no baseline"
        for file in files_of(run):
            load(history.folder, file)
        kept = load_arrays(history.folder, run.tasks[0].files["tokens"])
        assert (kept["kl"] == arrays["kl"]).all()


def test_the_baseline_is_the_last_accepted_run_of_the_same_build_and_suite(tmp_path: Path, write: Write) -> None:  # noqa: F811
    days = [f"2026-01-0{day}T00:00:00+00:00" for day in range(1, 6)]
    with History.open(tmp_path / "history") as history:
        good = history.add(tmp_path / "1", write("1", started=days[0], verdict=PASS))
        history.add(tmp_path / "2", write("2", started=days[1]))  # a regression
        history.add(tmp_path / "3", write("3", started=days[2], verdict=PASS, suite_sha256="2" * 64))  # another suite
        history.add(tmp_path / "4", write("4", started=days[3], verdict=PASS), name="other")
        assert history.baseline("tiny-awq", SHA) == good
        second = history.runs(name="tiny-awq")[1]
        history.accept(second.id)
        assert history.baseline("tiny-awq", SHA) == history.run(second.id)
        history.accept(second.id, False)
        assert history.baseline("tiny-awq", SHA) == good
        assert [entry.run.started for entry in history.runs(limit=2)] == [days[3], days[2]]


def test_a_trend_goes_in_the_order_in_which_runs_were_added(tmp_path: Path, write: Write) -> None:  # noqa: F811
    with History.open(tmp_path / "history") as history:
        for day, kld in ((2, 0.02), (1, 0.01), (3, 0.03)):
            history.add(tmp_path / str(day), write(str(day), kld, started=f"2026-01-0{day}T00:00:00+00:00"))
        points = history.trend("tiny-awq", "smoke", "stdlib", "kld.mean")
        assert [point.value for point in points] == [0.02, 0.01, 0.03]
        assert [point.value for point in history.trend("tiny-awq", "smoke", "stdlib", "kld.mean", limit=2)] == [
            0.01,
            0.03,
        ]
        assert history.trend("tiny-awq", "smoke", "stdlib", "no such metric") == []


def test_a_run_of_a_clock_that_was_ahead_is_the_newest_only_until_the_next(tmp_path: Path, write: Write) -> None:  # noqa: F811
    years = {"ahead": 2099, "first": 2026, "second": 2027}
    runs = {
        name: write(name, started=f"{year}-01-01T00:00:00+00:00", seed=year, verdict=PASS)
        for name, year in years.items()
    }
    with History.open(tmp_path / "history") as history:
        for name, run in runs.items():
            entry = history.add(tmp_path / name, run)
            assert history.baseline("tiny-awq", SHA) == entry
        assert [entry.run.started[:4] for entry in history.runs()] == ["2027", "2026", "2099"]
        before = {name: history.before(run, "tiny-awq") for name, run in runs.items()}
        assert before["ahead"] is None
        assert [one.run for one in (before["first"], before["second"]) if one] == [runs["ahead"], runs["first"]]
        last = history.before(write("fresh", seed=1), "tiny-awq")
        assert last is not None
        assert last.run == runs["second"], "before what is not added yet comes the newest"


def test_many_processes_may_add_at_once(tmp_path: Path, write: Write) -> None:  # noqa: F811
    runs = [write(str(number), started=f"2026-01-01T00:00:{number:02}+00:00") for number in range(8)]

    def add(number: int) -> None:
        with History.open(tmp_path / "history") as history:
            history.add(tmp_path / str(number), runs[number])

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with History.open(tmp_path / "history") as history:
        assert len(history.runs()) == 8


def test_what_changed_between_two_runs_is_named(write: Write) -> None:  # noqa: F811
    before = write("before")
    assert differences(before, write("again", started="2026-01-02T00:00:00+00:00")) == []
    after = write("after", versions={"torch": "3"}, suite_sha256="3" * 64)
    assert differences(before, after) == ["suite", "versions: torch 2 -> 3"]
    rebuilt = before.model_copy(update={"build": before.build.model_copy(update={"sha256": "4" * 64})})
    assert differences(before, rebuilt) == ["weights"]


def test_damage_and_wrong_requests_are_said(tmp_path: Path, write: Write) -> None:  # noqa: F811
    with pytest.raises(UsageError, match="no history there"), History.open(tmp_path / "none", create=False):
        pass
    run: Run = write()
    with History.open(tmp_path / "history") as history:
        history.add(tmp_path / "run", run)
        with pytest.raises(UsageError, match="no run 7"):
            history.accept(7)
    path = tmp_path / "history" / DATABASE_NAME
    with sqlite3.connect(path) as database:
        database.execute("UPDATE runs SET record = '{}'")
    database.close()
    with (
        History.open(tmp_path / "history") as history,
        pytest.raises(ArtifactError, match=r"history\.sqlite, run 1: is no run"),
    ):
        history.runs()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(ArtifactError, match="version 99"), History.open(tmp_path / "history"):
        pass
    path.write_bytes(b"no database at all" * 100)
    for extra in path.parent.glob("*-wal"):
        extra.unlink()
    with pytest.raises(ArtifactError, match="damaged"), History.open(tmp_path / "history"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(OutputError), History.open(tmp_path / "file"):
        pass


def test_an_error_within_the_block_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), History.open(tmp_path / "history"):
        (tmp_path / "absent").read_bytes()


def damaged(folder: Path, *statements: str) -> None:
    """Do to a history what qconv never does."""
    database = sqlite3.connect(folder / DATABASE_NAME)
    with database:
        for statement in statements:
            database.execute(statement)
    database.close()


def read_all(folder: Path) -> None:
    with History.open(folder) as history:
        history.runs()
        history.trend("tiny-awq", "smoke", "stdlib", "kld.mean")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE metrics SET value = 'high'",
        "UPDATE metrics SET low = x'00'",
        "UPDATE runs SET name = x'ff'",
        "UPDATE runs SET name = CAST(x'ff' AS TEXT)",
        "UPDATE runs SET record = x'7b7d'",
        "UPDATE runs SET record = 7",
        "UPDATE runs SET record = replace(record, '\"tokens\"', '\"broken\"')",
        "UPDATE runs SET accepted = 'yes'",
        "DROP TABLE metrics",
        "DROP TABLE runs",
        "ALTER TABLE runs RENAME COLUMN record TO told",
    ],
)
def test_what_qconv_did_not_write_there_is_corrupt(tmp_path: Path, write: Write, statement: str) -> None:  # noqa: F811
    with History.open(tmp_path / "history") as history:
        history.add(tmp_path / "run", write())
    damaged(tmp_path / "history", statement)
    with pytest.raises(ArtifactError, match=r"history\.sqlite") as caught:
        read_all(tmp_path / "history")
    assert caught.value.hint


def test_another_programs_database_is_left_as_it_is(tmp_path: Path) -> None:
    damaged(tmp_path, "CREATE TABLE notes (text TEXT)", "INSERT INTO notes VALUES ('mine')")
    before = (tmp_path / DATABASE_NAME).read_bytes()
    with pytest.raises(OutputError, match="something else"), History.open(tmp_path):
        pass
    assert (tmp_path / DATABASE_NAME).read_bytes() == before


def test_pages_of_rubbish_are_corrupt(tmp_path: Path, write: Write) -> None:  # noqa: F811
    with History.open(tmp_path / "history") as history:
        history.add(tmp_path / "run", write())
    path = tmp_path / "history" / DATABASE_NAME
    data = bytearray(path.read_bytes())
    data[100:] = b"\x5a" * (len(data) - 100)  # SQLite's header has 100 bytes: it is a database, and nothing else
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="damaged"), History.open(tmp_path / "history") as history:
        history.runs()


def test_a_history_that_is_held_or_no_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qconv.evaluation.history._WAIT_SECONDS", 0.01)
    with History.open(tmp_path / "history"):
        pass
    holder = sqlite3.connect(tmp_path / "history" / DATABASE_NAME, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(OutputError, match="locked") as caught, History.open(tmp_path / "history"):
        pass
    holder.close()
    assert "Another process" in str(caught.value.hint)
    (tmp_path / "folder" / DATABASE_NAME).mkdir(parents=True)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / DATABASE_NAME)
    for name in ("folder", "pipe"):
        with pytest.raises(OutputError, match=r"history\.sqlite"), History.open(tmp_path / name):
            pass


def test_a_history_of_the_version_before_is_read_and_goes_on(tmp_path: Path, write: Write) -> None:  # noqa: F811
    """The tables as they have been since the first version, with a run whose record lacks what came later."""
    with History.open(tmp_path / "history") as history:
        history.add(tmp_path / "old", write("old", verdict=PASS))
    damaged(
        tmp_path / "history",
        "UPDATE runs SET record = json_remove(record, '$.gates_sha256', '$.unmeasured')",
        "DROP INDEX runs_by_name",
        "CREATE INDEX runs_by_name ON runs (name, suite, started)",
    )
    with History.open(tmp_path / "history") as history:
        new = history.add(tmp_path / "new", write("new", seed=1, started="2020-01-01T00:00:00+00:00", verdict=PASS))
        assert history.baseline("tiny-awq", SHA) == new
        assert len(history.runs()) == 2
