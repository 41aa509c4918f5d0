"""The cache: content decides, damage is repaired, processes wait for each other."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from pydantic import JsonValue

from qconv.errors import ArtifactError
from qconv.evaluation.cache import Cache, Entry, default_folder


def test_a_part_is_made_once(tmp_path: Path) -> None:
    made = []

    def make() -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
        made.append(1)
        return {"x": np.arange(4, dtype=np.float32)}

    key: dict[str, JsonValue] = {"weights": "abc", "tokens": 3}
    for _ in range(2):
        entry = Cache(tmp_path).entry("reference", key)
        np.testing.assert_array_equal(entry.arrays("part", make)["x"], [0, 1, 2, 3])
    assert len(made) == 1


def test_another_key_is_another_entry_and_order_does_not_matter(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.entry("a", {"x": 1, "y": 2}).path == cache.entry("a", {"y": 2, "x": 1}).path
    assert cache.entry("a", {"x": 1, "y": 2}).path != cache.entry("a", {"x": 1, "y": 3}).path


@pytest.mark.parametrize("damage", ["flip", "truncate", "unsealed"])
def test_a_damaged_part_is_made_again(tmp_path: Path, damage: str) -> None:
    entry = Entry(tmp_path)
    entry.bytes_of("part", lambda: b"right")
    if damage == "unsealed":  # killed between the file and its checksum
        (tmp_path / "part.sha256").unlink()
    else:
        (tmp_path / "part").write_bytes(b"wrong" if damage == "flip" else b"rig")
    assert not entry.has("part")
    assert entry.bytes_of("part", lambda: b"right") == b"right"
    assert entry.has("part")


def test_times_do_not_matter(tmp_path: Path) -> None:
    import os

    entry = Entry(tmp_path)
    entry.bytes_of("part", lambda: b"right")
    os.utime(tmp_path / "part", (0, 0))
    assert entry.bytes_of("part", lambda: b"never") == b"right"


def _fill(path: Path, log: Path) -> None:
    def make() -> bytes:
        with log.open("a") as file:
            file.write("made\n")
        time.sleep(0.1)
        return b"x"

    assert Entry(path, shared=True).bytes_of("part", make) == b"x"


def test_a_part_is_made_once_by_all_who_want_it(tmp_path: Path) -> None:
    entry, log = Cache(tmp_path).entry("a", {}), tmp_path / "log"
    # The lock belongs to the open file, so threads that each open it exclude each other as processes do.
    threads = [threading.Thread(target=_fill, args=(entry.path, log)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.read_text() == "made\n"


def test_an_entry_of_ones_own_can_nest(tmp_path: Path) -> None:
    entry = Entry(tmp_path)
    assert entry.bytes_of("outer", lambda: entry.bytes_of("inner", lambda: b"x") + b"y") == b"xy"


def test_the_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("QCONV_CACHE", raising=False)
    assert default_folder() == tmp_path / "qconv"
    monkeypatch.setenv("QCONV_CACHE", str(tmp_path / "own"))
    assert default_folder() == tmp_path / "own"


def test_parts_that_are_whole_but_hold_something_else_are_named(tmp_path: Path) -> None:
    """As somebody leaves them who writes the checksum too."""
    entry = Cache(tmp_path).entry("kind", {"a": 1})
    entry.bytes_of("part", lambda: b"no arrays, no JSON")
    for read in (entry.arrays, entry.json):
        with pytest.raises(ArtifactError, match="part") as caught:
            read("part", dict)
        assert str(entry.path / "part") in str(caught.value.hint)


def test_a_part_that_is_no_file_is_made_again(tmp_path: Path) -> None:
    entry = Cache(tmp_path).entry("kind", {"a": 1})
    entry.bytes_of("part", lambda: b"one")
    (entry.path / "part").unlink()
    os.mkfifo(entry.path / "part")
    assert entry.bytes_of("part", lambda: b"other") == b"other"
    assert entry.has("part")
