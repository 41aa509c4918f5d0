"""A run's folder: what may be begun, continued and discarded there, and what is somebody else's."""

from __future__ import annotations

from pathlib import Path

import pytest

from qconv.errors import OutputError, StaleJournalError
from qconv.evaluation.cache import Cache, Entry
from qconv.evaluation.run_folder import begin, enter
from qconv.folders.journal import JOURNAL_NAME, Journal
from qconv.folders.ownership import WORK_FOLDER, own_folder, remove_claimed, write_own
from tests.conftest import folder_bytes

KEY = {name: name for name in ("build", "reference", "suite", "engine", "qconv")}
OTHER = KEY | {"suite": "another"}


def unfinished(out: Path, key: dict[str, str] = KEY) -> Path:
    """A run that was interrupted with one task's part on disk, and one array."""
    out.mkdir(exist_ok=True)
    enter(out, restart=False)
    begin(out, key, restart=False)
    Entry(own_folder(out / WORK_FOLDER / "task-text")).bytes_of("part", lambda: b"scores")
    (out / "files").mkdir(exist_ok=True)
    # sha256 of no bytes
    (out / "files/e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855.safetensors").touch()
    return out


def finished(out: Path) -> Path:
    """A run that is done; what run.json says does not matter to its folder."""
    unfinished(out)
    write_own(out / "run.json", b"{}")
    write_own(out / "report.html", b"<p>")
    remove_claimed(out / WORK_FOLDER)
    return out


def restart(out: Path) -> None:
    enter(out, restart=True)
    begin(out, OTHER, restart=True)


def test_a_run_is_continued_by_the_same_request_alone(tmp_path: Path) -> None:
    before = folder_bytes(unfinished(tmp_path))
    unfinished(tmp_path)
    with pytest.raises(StaleJournalError, match="suite"):
        unfinished(tmp_path, OTHER)
    assert folder_bytes(tmp_path) == before


@pytest.mark.parametrize("make", [unfinished, finished])
def test_restart_discards_a_run(make: object, tmp_path: Path) -> None:
    assert callable(make)
    restart(make(tmp_path))
    assert set(folder_bytes(tmp_path)) == {".qconv/key.json", ".qconv/.qconv-files"}


@pytest.mark.parametrize("make", [unfinished, finished])
@pytest.mark.parametrize(
    "strange",
    [
        *("thesis.tex", "photos/a.jpg", "files/mine.json", "blame.json", "report.md", "run.json", "report.html"),
        *(".qconv/notes.txt", ".qconv/task-text/mine", "files/" + "0" * 64 + ".json", "history.sqlite"),
    ],
)
def test_restart_removes_nothing_of_somebodys(make: object, strange: str, tmp_path: Path) -> None:
    assert callable(make)
    make(tmp_path)
    (tmp_path / strange).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / strange).write_bytes(b"mine")
    before = folder_bytes(tmp_path)
    with pytest.raises(OutputError, match="nothing was removed") as caught:
        restart(tmp_path)
    assert strange.split("/")[0] in caught.value.message
    assert folder_bytes(tmp_path) == before


@pytest.mark.parametrize("restarts", [True, False])
@pytest.mark.parametrize("names", [["run.json"], [".qconv/notes.txt"], ["thesis.tex"], ["run.json", "thesis.tex"]])
def test_a_folder_that_holds_no_run_is_left_alone(names: list[str], restarts: bool, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    before = folder_bytes(tmp_path)
    with pytest.raises(OutputError, match="something else than a run"):
        enter(tmp_path, restarts)
    assert folder_bytes(tmp_path) == before


@pytest.mark.parametrize("restarts", [True, False])
def test_an_unfinished_build_is_no_run(restarts: bool, tmp_path: Path) -> None:
    Journal.create(tmp_path / WORK_FOLDER / JOURNAL_NAME, {"weights": "a"})
    before = folder_bytes(tmp_path)
    with pytest.raises(OutputError, match="something else than a run"):
        enter(tmp_path, restarts)
    assert folder_bytes(tmp_path) == before


def test_what_a_kill_before_the_key_left_is_no_hindrance(tmp_path: Path) -> None:
    own_folder(tmp_path / WORK_FOLDER)
    (tmp_path / WORK_FOLDER / "key.json.partial").touch()
    with pytest.raises(OutputError, match="something else"):  # nothing says that it is the run's
        enter(tmp_path, restart=False)
    (tmp_path / WORK_FOLDER / "key.json.partial").unlink()
    unfinished(tmp_path)


def test_a_caches_entry_is_nobody_elses_folder(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    entry = cache.entry("reference", {"artifact": "a"})
    entry.bytes_of("part", lambda: b"mine")
    assert cache.entry("reference", {"artifact": "a"}).has("part")
    before = folder_bytes(tmp_path)
    (entry.path / "key.json").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"key\.json: was not written by qconv"):
        cache.entry("reference", {"artifact": "a"})
    (entry.path / "key.json").unlink()
    with pytest.raises(OutputError, match="was not made by qconv"):
        cache.entry("reference", {"artifact": "a"})
    assert folder_bytes(tmp_path) == {name: data for name, data in before.items() if not name.endswith("key.json")}
