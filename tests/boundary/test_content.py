"""Files known by their content: pointers, pages and models that are called otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from qconv.boundary.content import instead_of_file, is_gguf, misplaced_files
from qconv.boundary.reading import MAX_JSON_VALUES, parse_json, read_json
from qconv.errors import CheckpointError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 11422654\n"


def test_a_pointer_saved_as_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: .*it is a git-lfs pointer") as caught:
        read_json(tmp_path / "tokenizer.json", CheckpointError, hint="Repair it.")
    assert caught.value.hint == "Fetch the file itself: git lfs pull."


def test_json_is_not_read_if_it_would_take_gigabytes() -> None:
    # Two bytes a value in the text, 56 and more as an object.
    text = b"[" + b",".join([b"[]"] * (MAX_JSON_VALUES // 2 + 1)) + b"]"
    with pytest.raises(CheckpointError, match="more than 5,000,000 values"):
        parse_json(text, "x", CheckpointError)


def test_files_that_a_download_left_are_found_in_a_folder(tmp_path: Path) -> None:
    contents = {
        "model-00001-of-00002.safetensors": POINTER,
        "tokenizer.json": b"<!DOCTYPE html>\n<html>",
        "page.html": b"<!DOCTYPE html>",  # what it is called
        "chat_template.jinja": b"<?xml version='1.0'?>{% for message in messages %}",  # a prompt may be XML
        "config.json": b'{"a": "version https://git-lfs.github.com/spec/v1"}',
        "merges.txt": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "broken.json").symlink_to(tmp_path / "absent")
    (tmp_path / "vocab.json").symlink_to("/dev/zero")
    assert list(misplaced_files(tmp_path)) == ["model-00001-of-00002.safetensors", "tokenizer.json"]
    (tmp_path / "chat_template.jinja").write_bytes(POINTER)
    assert "chat_template.jinja" in misplaced_files(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{}", b"version 2", b"Not", b"\x00" * 600])
def test_other_content_is_nothing_else(text: bytes) -> None:
    assert instead_of_file(text) is None


@pytest.mark.parametrize(
    ("files", "model", "expected"),
    [
        (["a.gguf"], "a.gguf", True),
        (["a.GGUF"], "a.GGUF", True),
        (["sha256-3a1b2c"], "sha256-3a1b2c", True),
        (["a.gguf"], "", True),
        (["a.GGUF"], "", True),
        (["a-Q8_0.gguf", "config.json", "tokenizer.json"], "", True),
        (["a.gguf", "config.json", "model.safetensors"], "", False),
        (["a.gguf", "config.json", "model.safetensors.index.json"], "", False),
        (["config.json"], "", False),
    ],
)
def test_gguf_by_content_and_by_what_lies_beside_it(
    tmp_path: Path, files: list[str], model: str, expected: bool
) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"GGUF" if name.startswith(("a", "sha")) else b"{}")
    assert is_gguf(tmp_path / model) == expected


def test_a_name_alone_makes_no_gguf_of_other_content(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"GGML")
    assert not is_gguf(tmp_path / "blob")
    assert is_gguf(tmp_path / "absent.gguf")  # so that its absence is said of a GGUF file
