"""The speed script's own arithmetic: turns, what must be reached, results kept by type."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from evals import ggml_speed
from evals.ggml_speed import Row, Speed, in_turns, store, tasks

ROW = Row(
    type="Q4_K",
    imatrix=True,
    wall={"1": Speed(20e6, 10e6), "2": Speed(39e6, 19e6)},
    processor=Speed(20e6, 10e6),
    error=0.95,
    cores=2,
    load=1.0,
    compiled=True,
)


def test_what_must_be_reached() -> None:
    assert ROW.fast_enough
    slower = {"1": Speed(20e6, 10e6), "2": Speed(37e6, 19e6)}
    assert not replace(ROW, wall=slower).fast_enough
    assert replace(ROW, wall=slower, type="Q6_K").fast_enough  # as fast is enough
    assert not replace(ROW, wall={"1": Speed(9e6, 10e6)}, type="IQ3_S").fast_enough
    for reported in (replace(ROW, imatrix=False), replace(ROW, type="Q8_0")):
        assert replace(reported, wall={"1": Speed(1e6, 10e6)}).fast_enough


def test_a_type_measured_again_replaces_its_row_and_no_other(tmp_path: Path) -> None:
    for row in (ROW, replace(ROW, imatrix=False), replace(ROW, type="Q2_K", compiled=False), replace(ROW, error=0.5)):
        store(tmp_path, row)
    table = (tmp_path / "ggml-speed.md").read_text().splitlines()
    assert [line.split(" | ")[:2] for line in table[2:]] == [
        ["| Q2_K (torch)", "yes"],
        ["| Q4_K", "no"],
        ["| Q4_K", "yes"],
    ]
    assert table[4] == ("| Q4_K | yes | 20.0 | 10.0 | 2.00 | 39.0 | 19.0 | 2.05 | 2.00 | 2 | 0.5000 | 2 | 1.0 |")
    assert len({line.count("|") for line in table}) == 1


def test_the_best_turn_counts_and_both_take_turns() -> None:
    now = 0.0
    turns: list[str] = []

    def clock() -> float:
        return now

    def passing(name: str, *seconds: float):  # type: ignore[no-untyped-def]  # a closure
        times = iter(seconds)

        def one() -> None:
            nonlocal now
            turns.append(name)
            now += next(times)

        return one

    # The first pass of each only tells how long it takes.
    speed = in_turns((passing("a", 9.0, 4.0, 2.0), passing("b", 9.0, 5.0, 8.0)), 40, 2, 0.0, clock)
    assert speed == Speed(20.0, 8.0)
    assert turns == ["a", "b", "b", "a", "a", "b"]


def test_tasks_cover_all_rows() -> None:
    ranges = tasks(torch.empty(ggml_speed.ROWS_A_TASK * 2 + 5, 1))
    assert [stop for _, stop in ranges[:-1]] == [start for start, _ in ranges[1:]]
    assert (ranges[0][0], ranges[-1][1]) == (0, ggml_speed.ROWS_A_TASK * 2 + 5)
