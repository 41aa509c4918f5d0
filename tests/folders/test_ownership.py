"""What is proven to be qconv's, and that replacing it loses nothing at whatever step the process dies."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qconv.errors import OutputError
from qconv.folders.ownership import (
    DISCARDED_NAME,
    LEDGER_NAME,
    TRASH_NAME,
    WORK_FOLDER,
    claim,
    claimed,
    ledger,
    own_folder,
    recover,
    remove_claimed,
    replaced,
    require_free,
    require_own,
    strangers,
    within,
    write_own,
)
from tests.conftest import folder_bytes


def sha256(data: bytes) -> frozenset[str]:
    return frozenset({hashlib.sha256(data).hexdigest()})


def test_a_ledger_lists_names_before_the_files_exist(tmp_path: Path) -> None:
    folder = own_folder(tmp_path / "a/b")
    assert ledger(folder) == {LEDGER_NAME: None}
    claim(folder / "work.bin")
    claim(folder / "seen.txt", "0" * 64)
    claim(folder / "seen.txt", "1" * 64)  # its old and its new content, whichever a kill leaves
    assert ledger(folder) == {LEDGER_NAME: None, "work.bin": None, "seen.txt": frozenset({"0" * 64, "1" * 64})}
    assert ledger(tmp_path / "a") is None
    before = (folder / LEDGER_NAME).read_bytes()
    claim(folder / "work.bin")
    own_folder(folder)
    assert (folder / LEDGER_NAME).read_bytes() == before, "what is said is not said again"


def test_a_ledger_cut_anywhere_is_still_one(tmp_path: Path) -> None:
    folder = own_folder(tmp_path)
    claim(folder / "a")
    claim(folder / "b")
    whole = (folder / LEDGER_NAME).read_bytes()
    for length in range(len(whole)):
        (folder / LEDGER_NAME).write_bytes(whole[:length])
        assert ledger(folder) is not None
        claim(folder / "a")
        claim(folder / "b")
        assert (folder / LEDGER_NAME).read_bytes() == whole


@pytest.mark.parametrize("data", [b"mine", b'{"qconv-files":2}\n', b"{}\n"])
def test_somebodys_file_of_a_ledgers_name_stays(tmp_path: Path, data: bytes) -> None:
    (tmp_path / LEDGER_NAME).write_bytes(data)
    assert ledger(tmp_path) is None
    for attempt in (
        lambda: own_folder(tmp_path),
        lambda: claim(tmp_path / "a"),
        lambda: write_own(tmp_path / "a", b""),
    ):
        with pytest.raises(OutputError, match=LEDGER_NAME):
            attempt()
    assert folder_bytes(tmp_path) == {LEDGER_NAME: data}


def test_a_line_that_leads_elsewhere_proves_nothing(tmp_path: Path) -> None:
    folder = own_folder(tmp_path / "in")
    (tmp_path / "victim").touch()
    with (folder / LEDGER_NAME).open("a") as file:
        for line in ('{"name":"../victim","sha256":null}', "[]", "7", "{", '{"name":"x"}'):
            file.write(line + "\n")
    assert ledger(folder) == {LEDGER_NAME: None}
    remove_claimed(folder)
    assert not folder.exists()
    assert (tmp_path / "victim").exists()


def test_strangers_are_all_that_no_listing_proves(tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    for name in ("ours/a", "ours/changed", "theirs", "work"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "work")
    (tmp_path / "linked").symlink_to(tmp_path / "ours", target_is_directory=True)
    os.mkfifo(tmp_path / "pipe")
    owned = {
        "ours/a": sha256(b"ours/a"),
        "ours/changed": sha256(b"before"),
        "work": None,
        "link": None,
        "linked/a": None,
        "pipe": None,
        "gone": None,
    }
    assert strangers(tmp_path, owned) == ["empty/", "link", "linked/", "ours/changed", "pipe", "theirs"]
    with pytest.raises(OutputError, match=r"empty/, link, linked/, ours/changed, pipe and 1 more.*nothing was removed"):
        require_own(tmp_path, owned)


def test_what_is_written_replaces_nothing_of_others(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    require_free(tmp_path, ["new", "taken"], {"taken": sha256(b"mine")})
    for name in ("taken", "folder", "dangling"):
        with pytest.raises(OutputError, match=name):
            require_free(tmp_path, ["new", name], {"taken": sha256(b"before"), "folder": None, "dangling": None})


def test_what_was_written_may_be_written_again_unless_somebody_changed_it(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    write_own(report, b"one")
    write_own(report, b"two")
    report.write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"report\.html"):
        write_own(report, b"three")
    assert report.read_bytes() == b"mine"
    (tmp_path / "other.partial").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"other\.partial"):
        write_own(tmp_path / "other", b"")
    assert (tmp_path / "other.partial").read_bytes() == b"mine"


def test_only_what_is_claimed_is_removed(tmp_path: Path) -> None:
    work = own_folder(tmp_path / "work")
    for name in ("a.bin", "b.txt"):
        claim(work / name).touch()
    claim(own_folder(work / "task") / "c").touch()
    (work / "task" / "mine").touch()
    (work / "mine.bin").touch()
    remove_claimed(work, (".bin",))
    assert set(claimed(work)) == {LEDGER_NAME, "a.bin", "b.txt", "task/c", f"task/{LEDGER_NAME}"}
    assert sorted(folder_bytes(work)) == [
        LEDGER_NAME,
        "b.txt",
        "mine.bin",
        "task/" + LEDGER_NAME,
        "task/c",
        "task/mine",
    ]
    remove_claimed(work)
    assert sorted(folder_bytes(work)) == ["mine.bin", "task/mine"]
    remove_claimed(tmp_path / "absent")


class Killed(BaseException):
    """The process died here."""


def old_folder(folder: Path, unfinished: bool) -> tuple[dict[str, bytes], dict[str, frozenset[str] | None]]:
    """A folder of qconv's, finished or not, its bytes and its listing."""
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_bytes(b"old")
    (folder / "sub/shard").write_bytes(b"old shard")
    owned: dict[str, frozenset[str] | None] = {"config.json": sha256(b"old"), "sub/shard": sha256(b"old shard")}
    if unfinished:
        claim(own_folder(folder / WORK_FOLDER) / "journal").write_bytes(b"old journal")
        owned |= within(WORK_FOLDER, claimed(folder / WORK_FOLDER))
    return folder_bytes(folder), owned


def begin(folder: Path, owned: dict[str, frozenset[str] | None], error: type[BaseException] | None = None) -> None:
    """What a command does with --restart; it may fail once it has begun."""
    with replaced(folder, owned):
        claim(own_folder(folder / WORK_FOLDER) / "journal").write_bytes(b"new journal")
        if error is not None:
            raise error


CALLS = ("mkdir", "rename", "unlink", "rmdir", "write_bytes")


@pytest.mark.parametrize("unfinished", [False, True])
def test_a_kill_before_any_step_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unfinished: bool
) -> None:
    """The old comes back whole as long as the new has not begun; then nothing of the old is left; and it goes on."""
    made = {f"{WORK_FOLDER}/journal": b"new journal"}
    outcomes = []
    for number in range(100):
        folder = tmp_path / str(number)
        before, owned = old_folder(folder, unfinished)
        with monkeypatch.context() as patched:
            steps = kill_at(patched, number)
            try:
                begin(folder, owned)
            except Killed:
                pass
            else:
                break
        assert steps() == number + 1
        recover(folder)
        found = {name: data for name, data in folder_bytes(folder).items() if not name.endswith(LEDGER_NAME)}
        old = {name: data for name, data in before.items() if not name.endswith(LEDGER_NAME)}
        assert found in (old, made), number
        outcomes.append(found == made)
        assert not (folder / TRASH_NAME).exists()
        assert not (folder / DISCARDED_NAME).exists()
        if found == old:
            begin(folder, owned)
    assert outcomes == sorted(outcomes), "once begun, the new stays"
    assert {False, True} <= set(outcomes)


def kill_at(patched: pytest.MonkeyPatch, number: int) -> Callable[[], int]:
    """Let the process die before its n-th change to the file system; tells how many were tried."""
    count = 0

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count > number:
                raise Killed
            return real(*args, **options)

        return call

    for name in CALLS:
        patched.setattr(Path, name, wrapped(getattr(Path, name)))
    # A killed process does not tidy up after itself.
    patched.setattr("qconv.folders.ownership.recover", lambda _: None)
    return lambda: count


@pytest.mark.parametrize("unfinished", [False, True])
def test_a_kill_while_putting_back_loses_nothing_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unfinished: bool
) -> None:
    for number in range(100):
        folder = tmp_path / str(number)
        before, owned = old_folder(folder, unfinished)
        with monkeypatch.context() as patched:
            patched.setattr("qconv.folders.ownership.recover", lambda _: None)
            with pytest.raises(Killed):
                begin(folder, owned, Killed)
        with monkeypatch.context() as patched:
            kill_at(patched, number)
            try:
                recover(folder)
            except Killed:
                pass
            else:
                assert number > 5, "the kills came before the end"
                break
        recover(folder)
        assert folder_bytes(folder) == before, number


def test_an_error_puts_everything_back_at_once(tmp_path: Path) -> None:
    before, owned = old_folder(tmp_path / "out", unfinished=True)
    with pytest.raises(KeyError), replaced(tmp_path / "out", owned):
        raise KeyError
    assert folder_bytes(tmp_path / "out") == before


def test_what_somebody_put_into_the_trash_stays(tmp_path: Path) -> None:
    _, owned = old_folder(tmp_path, unfinished=False)
    with replaced(tmp_path, owned):
        (tmp_path / TRASH_NAME / "files" / "mine").write_bytes(b"mine")
    assert folder_bytes(tmp_path)[f"{DISCARDED_NAME}/files/mine"] == b"mine"
    assert "config.json" not in os.listdir(tmp_path / DISCARDED_NAME / "files")
    recover(tmp_path)
    assert folder_bytes(tmp_path)[f"{DISCARDED_NAME}/files/mine"] == b"mine"


@pytest.mark.parametrize("name", [TRASH_NAME, DISCARDED_NAME])
@pytest.mark.parametrize(
    "listing",
    [
        b"mine",
        b'{"entries": ["../../victim"], "files": ["../../victim"]}',
        b'{"entries": ["/etc"], "files": ["/etc/passwd"]}',
        b'{"entries": [], "files": ["out/victim"]}',
        b'{"entries": 3}',
    ],
)
def test_a_trash_folder_that_leads_elsewhere_is_harmless(tmp_path: Path, name: str, listing: bytes) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    folder = tmp_path / "folder"
    contents = folder / name / "files"
    contents.mkdir(parents=True)
    (contents / "out").symlink_to(tmp_path, target_is_directory=True)
    (folder / name / "listing.json").write_bytes(listing)
    recover(folder)
    assert victim.read_bytes() == b"mine"
    assert (contents / "out").is_symlink()


def test_what_lies_in_the_way_of_putting_back_is_named(tmp_path: Path) -> None:
    before, owned = old_folder(tmp_path, unfinished=False)

    def disturbed() -> None:
        with replaced(tmp_path, owned):
            (tmp_path / "config.json").write_bytes(b"mine")
            raise KeyError

    with pytest.raises(OutputError, match=r"config\.json: lies where"):
        disturbed()
    assert (tmp_path / "config.json").read_bytes() == b"mine"
    (tmp_path / "config.json").rename(tmp_path.parent / "mine")
    recover(tmp_path)
    assert folder_bytes(tmp_path) == before
