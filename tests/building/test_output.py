"""The output folder: whose it is, and what --restart may remove."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qconv.building.output import begin, enter, publish, require_apart, require_disk
from qconv.checkpoint.writer import ShardRecord
from qconv.errors import OutputError, UsageError
from qconv.folders.state import FolderState, folder_state
from qconv.verification.checksums import render_checksums
from tests.conftest import folder_bytes


def touch(folder: Path, *names: str) -> Path:
    """A folder with empty files."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


@pytest.mark.parametrize(
    ("names", "state"),
    [
        ([], FolderState.EMPTY),
        ([".qconv/"], FolderState.EMPTY),  # killed before its first line
        ([".qconv/journal.jsonl"], FolderState.UNFINISHED),
        ([".qconv/journal.jsonl", "model-00001-of-00002.safetensors", "config.json"], FolderState.UNFINISHED),
        ([".qconv/notes.txt"], FolderState.FOREIGN),
        ([".qconv/key.json"], FolderState.FOREIGN),  # of an evaluation
        ([".qconv/.qconv-files"], FolderState.EMPTY),  # an empty ledger: killed while it was begun
        (["SHA256SUMS", "qconv-report.json", "config.json"], FolderState.COMPLETE),
        (["SHA256SUMS", "qconv-report.json", ".qconv/journal.jsonl"], FolderState.COMPLETE),  # killed while tidying up
        (["qconv-report.json"], FolderState.FOREIGN),
        (["SHA256SUMS"], FolderState.FOREIGN),
        (["config.json", "model.safetensors"], FolderState.FOREIGN),
        (["notes.txt"], FolderState.FOREIGN),
        ([".hidden"], FolderState.FOREIGN),
    ],
    ids=str,
)
def test_what_a_folder_holds(tmp_path: Path, names: list[str], state: FolderState) -> None:
    for name in names:
        if name.endswith("/"):
            (tmp_path / name).mkdir()
        else:
            touch(tmp_path, name)
    assert folder_state(tmp_path) is state


def test_a_folder_that_is_not_there_is_empty_and_a_file_is_an_error(tmp_path: Path) -> None:
    assert folder_state(tmp_path / "absent") is FolderState.EMPTY
    with pytest.raises(OutputError, match="is a file"):
        folder_state(touch(tmp_path, "file") / "file")


FINGERPRINTS = {"weights": "a" * 64}


def finished(out: Path, *names: str, content: bytes = b"ours", extra: dict[str, Any] | None = None) -> Path:
    """A finished build with files of these names."""
    for name in names:
        touch(out, name)
        (out / name).write_bytes(content)
    (out / "qconv-report.json").write_text(json.dumps({"fingerprints": FINGERPRINTS, **(extra or {})}))
    sums = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in (*names, "qconv-report.json")}
    (out / "SHA256SUMS").write_text(render_checksums(sums))
    return out


def restart(out: Path, needed: int = 0) -> None:
    """What a command does whose request is known to be good."""
    enter(out)
    begin(out, FINGERPRINTS, ["config.json"], lambda _: needed, restart=True)


BUILD = (
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "tokenizer.json",
    "chat_template.jinja",
    "README.md",
    "LICENSE",
    "qconv-scales/layer-00000.safetensors",
)
NEW = {".qconv/journal.jsonl", ".qconv/.qconv-files"}


def test_restart_discards_a_finished_build(tmp_path: Path) -> None:
    restart(finished(tmp_path, *BUILD))
    assert set(folder_bytes(tmp_path)) == NEW
    assert [entry.name for entry in tmp_path.iterdir()] == [".qconv"]


def test_restart_discards_a_gguf_build_by_what_its_report_lists(tmp_path: Path) -> None:
    restart(finished(tmp_path, "m-Q8_0.gguf", "imatrix.gguf", "README.md", extra={"files": ["m-Q8_0.gguf"]}))
    assert set(folder_bytes(tmp_path)) == NEW


def test_restart_discards_an_unfinished_build(tmp_path: Path) -> None:
    journal, resumed = begin(tmp_path, FINGERPRINTS, [], lambda _: 0, restart=False)
    assert not resumed
    publish(tmp_path, journal, {"config.json": b"{}"})
    journal.announce([ShardRecord("model-00001-of-00001.safetensors", 4, hashlib.sha256(b"data").hexdigest())])
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(b"data")
    journal.staged("head").write_bytes(b"half of it")
    restart(tmp_path)
    assert set(folder_bytes(tmp_path)) == NEW


FOREIGN = (
    "notes.txt",
    "results.json",
    "LICENSE.mine",
    "tokenizer_notes.docx",
    "other.gguf",
    "model.safetensors",
    "config.json.partial",
    "data/model.safetensors",
    ".git/config",
    ".qconv/notes.txt",
    "qconv-scales/mine.safetensors",
)


@pytest.mark.parametrize("strange", FOREIGN)
@pytest.mark.parametrize("complete", [True, False])
def test_restart_removes_nothing_where_something_is_somebodys(tmp_path: Path, strange: str, complete: bool) -> None:
    if complete:
        finished(tmp_path, *BUILD)
    else:
        begin(tmp_path, FINGERPRINTS, [], lambda _: 0, restart=False)
    before = folder_bytes(touch(tmp_path, strange))
    with pytest.raises(OutputError, match="nothing was removed") as caught:
        restart(tmp_path)
    assert strange.split("/")[0] in caught.value.message
    assert folder_bytes(tmp_path) == before


def test_a_file_that_somebody_added_to_the_checksums_stays(tmp_path: Path) -> None:
    before = folder_bytes(finished(tmp_path, *BUILD, "thesis.tex"))
    with pytest.raises(OutputError, match=r"thesis\.tex.*nothing was removed"):
        restart(tmp_path)
    assert folder_bytes(tmp_path) == before


@pytest.mark.parametrize("name", ["README.md", "config.json", "qconv-report.json", "tokenizer.json"])
def test_a_file_of_the_build_that_somebody_changed_stays(tmp_path: Path, name: str) -> None:
    finished(tmp_path, *BUILD)
    (tmp_path / name).write_text('{"mine": 1}')
    before = folder_bytes(tmp_path)
    with pytest.raises(OutputError, match="changed since; nothing was removed") as caught:
        restart(tmp_path)
    assert name in caught.value.message
    assert folder_bytes(tmp_path) == before


def test_restart_follows_and_removes_no_link(tmp_path: Path) -> None:
    target = touch(tmp_path / "elsewhere", "journal.jsonl")
    (target / "shard").write_bytes(b"ours")
    for name, aim in ((BUILD[0], target / "shard"), (".qconv", target)):
        out = finished(tmp_path / f"out-{name}", *BUILD)
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(aim)
        with pytest.raises(OutputError, match="nothing was removed"):
            restart(out)
        assert (out / name).is_symlink()
    assert set(folder_bytes(target)) == {"journal.jsonl", "shard"}


def test_restart_is_refused_before_anything_is_moved(small_disk: Callable[[int], Path]) -> None:
    out = finished(small_disk(1 << 20) / "out", *BUILD)
    before = folder_bytes(out)
    with pytest.raises(OutputError, match="the disk would run full"):
        restart(out, needed=1 << 21)
    assert folder_bytes(out) == before


def test_what_a_restart_frees_counts_as_free(small_disk: Callable[[int], Path]) -> None:
    out = finished(small_disk(1 << 20) / "out", *BUILD, content=bytes(100_000))  # nine files of it
    restart(out, needed=900_000)
    assert set(folder_bytes(out)) == NEW


def test_a_run_overwrites_nothing_that_lies_where_it_would_write(tmp_path: Path) -> None:
    journal, _ = begin(tmp_path, FINGERPRINTS, ["config.json"], lambda _: 0, restart=False)
    publish(tmp_path, journal, {"config.json": b"{}"})
    begin(tmp_path, FINGERPRINTS, ["config.json"], lambda _: 0, restart=False)  # its own file it may write again
    (tmp_path / "config.json").write_bytes(b"mine")
    (tmp_path / "notes.txt").touch()  # no run writes that: it is in nobody's way
    with pytest.raises(OutputError, match=r"holds config\.json, which qconv did not write"):
        begin(tmp_path, FINGERPRINTS, ["config.json"], lambda _: 0, restart=False)
    assert (tmp_path / "config.json").read_bytes() == b"mine"


def test_model_and_output_must_lie_apart(tmp_path: Path) -> None:
    model, other = tmp_path / "model", tmp_path / "other"
    require_apart(model, other)
    require_apart(model, tmp_path / "model-awq")  # a common prefix is no overlap
    for out in (model, model / "build", tmp_path, other / ".." / "model"):
        with pytest.raises(UsageError, match="overlaps"):
            require_apart(model, out)
    model.mkdir()
    (tmp_path / "link").symlink_to(model)
    with pytest.raises(UsageError, match="overlaps"):
        require_apart(model, tmp_path / "link")


def test_too_little_disk_is_said_before_the_work(small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(1 << 20)
    require_disk(disk, 1 << 19)
    with pytest.raises(OutputError, match="the disk would run full"):
        require_disk(disk, 1 << 21)
