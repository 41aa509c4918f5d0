"""What the machine has, from files as kernels write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qconv.core.machine import available_memory, processors

MEMINFO = "MemTotal:       24691652 kB\nMemFree:         1000 kB\nMemAvailable:   2048 kB\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 2048 * 1024),
        ({"memory.max": "max\n", "memory.current": "5\n"}, 2048 * 1024),
        ({"memory.max": "1048576\n", "memory.current": "48576\n"}, 1_000_000),
        ({"memory/memory.limit_in_bytes": "300\n", "memory/memory.usage_in_bytes": "100\n"}, 200),
        ({"memory.max": "100\n", "memory.current": "500\n"}, 0),
        ({"memory.max": "?\n", "memory.current": "5\n"}, 2048 * 1024),
    ],
)
def test_the_least_limit_counts(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_memory(tmp_path / "meminfo", tmp_path) == expected


def test_nothing_may_be_known(tmp_path: Path) -> None:
    assert available_memory(tmp_path / "absent", tmp_path) is None
    (tmp_path / "meminfo").write_text("MemAvailable: many kB\n")
    assert available_memory(tmp_path / "meminfo", tmp_path) is None
    assert processors() >= 1
    here = available_memory()
    assert here is None or here > 0
