"""SHA256SUMS from outside: what it may name, what it must name, and what is never read."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from qconv.folders.state import CHECKSUMS_NAME
from qconv.verification.checksums import (
    MAX_CHECKSUM_BYTES,
    check_sums,
    check_sums_of,
    parse_checksums,
    render_checksums,
)
from qconv.verification.outcome import Verification

ZERO = "0" * 64


def sealed(folder: Path, **files: bytes) -> Path:
    """A folder of files, underscores for dots in their names, with true checksums."""
    sums = {}
    for name, content in files.items():
        file = folder / name.replace("_", ".")
        file.write_bytes(content)
        sums[file.name] = hashlib.sha256(content).hexdigest()
    (folder / CHECKSUMS_NAME).write_text(render_checksums(sums))
    return folder


def found(folder: Path) -> Verification:
    result = Verification()
    check_sums(folder, result, None)
    return result


def add_line(folder: Path, name: str, digest: str = ZERO) -> None:
    with (folder / CHECKSUMS_NAME).open("a") as file:
        file.write(f"{digest}  {name}\n")


@pytest.mark.parametrize(
    "name",
    [
        "/dev/zero",
        "/etc/hostname",
        "../outside.json",
        "a/../../outside.json",
        "zero",
        "pipe",
        "out",
        "through/outside.json",
    ],
)
def test_what_lies_elsewhere_or_is_no_file_is_refused_unread(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "build"
    folder.mkdir()
    (tmp_path / "outside.json").write_text("{}")
    (folder / "zero").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe")
    (folder / "out").symlink_to(tmp_path / "outside.json")
    (folder / "through").symlink_to(tmp_path)
    sealed(folder, config_json=b"{}")
    add_line(folder, name)
    read: list[Path] = []

    def note(path: Path) -> str:
        read.append(path)
        return ""

    monkeypatch.setattr("qconv.verification.checksums.sha256_of", note)
    problems = [problem for problem in found(folder).problems if problem.startswith(f"{name}: ")]
    assert [problem.endswith("it was not read.") for problem in problems] == [True]
    assert [path.name for path in read] == ["config.json"]


def test_a_hub_snapshots_own_blobs_are_read(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    sealed(blobs, config_json=b"{}")
    for name in ("config.json", CHECKSUMS_NAME):
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    result = found(snapshot)
    assert (result.problems, result.checked) == ([], ["sha256 of 1 files"])


@pytest.mark.parametrize(
    "name",
    [
        *("modeling_evil.py", "pytorch_model.bin", "model.pt", "consolidated.00.pth", "adapter_config.json"),
        *("adapter_model.safetensors", "chat_template.jinja", "chat_template.json", "tokenizer.model", "vocab.txt"),
        *("generation_config.json", "pytorch_model.bin.index.json", "other.gguf", "OTHER.GGUF", "sub/code.py"),
    ],
)
def test_what_loaders_read_must_be_listed(tmp_path: Path, name: str) -> None:
    folder = sealed(tmp_path, config_json=b"{}", model_gguf=b"GGUF")
    assert found(folder).problems == []
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    assert found(folder).problems == [f"{name}: not listed in {CHECKSUMS_NAME}"]


def test_what_nobody_reads_is_named_and_counted(tmp_path: Path) -> None:
    folder = sealed(tmp_path, config_json=b"{}")
    for number in range(12):
        (folder / f"note{number:02}.txt").write_text("x")
    result = found(folder)
    assert result.problems == []
    assert result.notices[0] == "note00.txt: not part of the build"
    assert result.notices[-1] == "2 more files are not part of the build"


@pytest.mark.parametrize("line", ["", "model_gguf"])
def test_a_model_that_is_not_listed_is_a_problem(tmp_path: Path, line: str) -> None:
    folder = sealed(tmp_path, model_gguf=b"GGUF", config_json=b"{}")
    sums = parse_checksums((folder / CHECKSUMS_NAME).read_text())
    del sums["model.gguf"]
    (folder / CHECKSUMS_NAME).write_text(render_checksums(sums) if line else "")
    assert found(folder).problems
    result = Verification()
    check_sums_of([folder / "model.gguf"], result, None)
    assert result.problems


def test_files_are_checked_without_their_neighbours(tmp_path: Path) -> None:
    folder = sealed(tmp_path, model_gguf=b"GGUF", config_json=b"{}")
    (folder / "config.json").write_text("[]")
    (folder / "other.py").write_text("")
    result = Verification()
    check_sums_of([folder / "model.gguf"], result, None)
    assert (result.problems, result.checked) == ([], ["sha256 of 1 files"])
    (folder / "model.gguf").write_bytes(b"GGUX")
    check_sums_of([folder / "model.gguf"], result, None)
    assert result.problems == [f"model.gguf: its sha256 is not the one in {CHECKSUMS_NAME}"]


def test_others_ways_of_writing_the_format_are_read(tmp_path: Path) -> None:
    text = f"{'b' * 64} *z.json\n{'a' * 64}  ./a.json\n"
    assert parse_checksums(text) == {"z.json": "b" * 64, "a.json": "a" * 64}


@pytest.mark.parametrize(
    "text",
    [
        f"{ZERO}  a",
        f"{ZERO}  a\n\n",
        f"{ZERO}  a\n{ZERO}  a\n",
        f"{ZERO} a\n",
        f"{'G' * 64}  a\n",
        f"{'A' * 64}  a\n",
        f"{ZERO}  \n",
    ],
    ids=["cut off", "empty line", "twice", "one space", "no digit", "capitals", "no name"],
)
def test_text_that_is_no_checksum_file(text: str) -> None:
    with pytest.raises(ValueError, match=r"malformed|twice|cut off"):
        parse_checksums(text)


def test_a_checksum_file_that_is_none_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    sums = tmp_path / CHECKSUMS_NAME
    sums.symlink_to("/dev/zero")
    assert found(tmp_path).problems == [f"{CHECKSUMS_NAME}: a link that leads out of the folder; it was not read."]
    sums.unlink()
    sums.symlink_to("absent")
    assert found(tmp_path).problems
    sums.unlink()
    sums.write_bytes(b"\xff" * 100)
    assert found(tmp_path).problems
    with sums.open("wb") as file:
        file.truncate(MAX_CHECKSUM_BYTES + 1)  # a hole: takes no disk
    assert "are more than" in found(tmp_path).problems[0]
