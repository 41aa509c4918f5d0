"""The measurement of two builds of one calibration: what is compared with what."""

from __future__ import annotations

from pathlib import Path

import pytest

from evals.several_targets import Comparison, Cost, different, folder_of, measured, median
from tests.conftest import BUNDLED


def test_medians_are_of_each_figure_and_the_peak_is_the_highest() -> None:
    costs = [Cost(1.0, 9.0, 3), Cost(3.0, 8.0, 1), Cost(2.0, 7.0, 2)]
    assert median(costs) == Cost(2.0, 8.0, 3)


def test_both_are_held_against_the_dearer_one() -> None:
    found = Comparison(("a", "b"), (Cost(10.0, 20.0, 1), Cost(20.0, 10.0, 1)), Cost(30.0, 30.0, 1))
    assert (found.wall_ratio, found.ratio) == (1.5, 1.5)


def test_other_bytes_and_other_files_are_found(tmp_path: Path) -> None:
    for folder, files in (("one", {"same": "1", "other": "2", "left": "3"}), ("two", {"same": "1", "other": "4"})):
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text)
    assert different(tmp_path / "one", tmp_path / "two") == ["left", "other"]
    assert different(tmp_path / "one", tmp_path / "one") == []


@pytest.mark.slow
def test_a_small_measurement_finds_equal_bytes(tmp_path: Path) -> None:
    problems: list[str] = []
    found = measured(BUNDLED, ("gptq", "gguf:Q4_0"), 512, 1, tmp_path, problems)
    assert problems == []
    assert found.together.memory > 100 * 2**20
    assert (tmp_path / "together" / folder_of("gguf:Q4_0")).is_dir()
