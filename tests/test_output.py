"""The output folder: whose it is, and what --restart may remove."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qconv.errors import CheckpointError, OutputError, UsageError
from qconv.output import FolderState, clear, finished_report, folder_state, require_apart, require_disk


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


def test_restart_empties_a_build(tmp_path: Path) -> None:
    names = [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors.partial",
        "config.json.partial",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "README.md",
        "LICENSE",
        "SHA256SUMS",
        "qconv-report.json",
        "qconv-scales/layer-00000.safetensors",
        ".qconv/journal.jsonl",
        ".qconv/inputs-00000.bin",
    ]
    clear(touch(tmp_path, *names))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("strange", ["notes.txt", "thesis.tex", "data/model.safetensors", ".git/config", "weights.bin"])
def test_restart_removes_nothing_where_something_is_not_a_models(tmp_path: Path, strange: str) -> None:
    touch(tmp_path, "config.json", "model.safetensors", strange)
    with pytest.raises(OutputError, match="nothing was removed") as caught:
        clear(tmp_path)
    assert strange.split("/", maxsplit=1)[0] in caught.value.message
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors", strange.split("/")[0]}
    assert (tmp_path / strange).exists()


def test_restart_removes_a_link_and_not_what_it_points_to(tmp_path: Path) -> None:
    target = touch(tmp_path / "elsewhere", "weights")
    out = touch(tmp_path / "out", "config.json")
    (out / "model.safetensors").symlink_to(target / "weights")
    clear(out)
    assert list(out.iterdir()) == []
    assert (target / "weights").exists()


def test_restart_follows_no_link_to_a_folder(tmp_path: Path) -> None:
    target = touch(tmp_path / "elsewhere", "journal.jsonl")
    out = touch(tmp_path / "out", "config.json")
    (out / ".qconv").symlink_to(target, target_is_directory=True)
    clear(out)
    assert (target / "journal.jsonl").exists()


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


def test_a_report_without_fingerprints_is_refused(tmp_path: Path) -> None:
    for text in ("{}", '{"fingerprints": 3}', "{"):
        (tmp_path / "qconv-report.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"qconv-report\.json"):
            finished_report(tmp_path)
