"""The runtime's speed script: turns, what must be reached, processes of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from evals import runtime_speed
from evals.runtime_speed import BUNDLED, HEADING, Comparison, Row, Served, Turn, built, compared, peak_memory

FAST = Comparison(0.5, 1.0, 0.5, 0.4, 1.0, 0.4)
ROW = Row("tiny", "awq", FAST, FAST, 400_000_000, 600_000_000, 9_000_000, 30_000_000)


class Scripted(Served):
    """Turns without a process."""

    def __init__(self, turn: Callable[[int], Turn]) -> None:
        self._turn, self.asked = turn, 0

    def turn(self, task: str) -> Turn:
        self.asked += 1
        return self._turn(self.asked)

    def memory(self) -> tuple[int, int]:
        return 2, 1


def test_ratios_are_of_turns_beside_each_other() -> None:
    # Other work makes the second round ten times as long for both: medians of seconds would hide which one is slower.
    build = [Turn(0.9, 1.1), Turn(9.0, 11.0), Turn(0.5, 1.2)]
    bf16 = [Turn(1.0, 1.0), Turn(10.0, 10.0), Turn(2.0, 1.0)]
    comparison = Comparison.of(build, bf16)
    assert (comparison.wall_ratio, comparison.processor_ratio) == (0.9, 1.1)
    assert (comparison.wall, comparison.processor_bf16) == (0.9, 1.0)


def test_both_tasks_count_by_both_clocks() -> None:
    assert ROW.fast_enough
    for slow in (replace(FAST, wall_ratio=1.01), replace(FAST, processor_ratio=1.01)):
        assert not replace(ROW, decode=slow).fast_enough
        assert not replace(ROW, prefill=slow).fast_enough
    assert replace(ROW, decode=replace(FAST, wall_ratio=1.0)).fast_enough


def test_the_first_turn_does_not_count_and_both_take_as_many() -> None:
    packed, bf16 = Scripted(lambda turn: Turn(turn, turn)), Scripted(lambda turn: Turn(10, 10))
    row = compared("tiny", "awq", packed, bf16, 3)
    assert (packed.asked, bf16.asked) == (8, 8)
    assert (row.decode.wall, row.prefill.wall) == (3, 7)  # of 2, 3, 4 and of 6, 7, 8
    assert (row.peak, row.tensors) == (2, 1)


def test_lines_have_the_headings_columns() -> None:
    assert {line.count("|") for line in (*HEADING.splitlines(), ROW.line())} == {15}
    assert ROW.line().startswith("| tiny | awq | 400.0 | 1000.0 | 0.40 | 0.50 |")
    assert ROW.line().endswith("| 400 | 600 | 0.67 | 0.30 |")


@pytest.mark.parametrize(("wall", "status"), [(0.9, 0), (1.1, 1)])
def test_a_missed_bar_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], wall: float, status: int
) -> None:
    monkeypatch.setattr(sys, "argv", ["runtime_speed.py", "--models", "tiny", "--only", "awq", "--work", str(tmp_path)])
    monkeypatch.setattr(runtime_speed, "built", lambda *_: tmp_path)
    served = {"packed": Scripted(lambda _: Turn(wall, 0.5)), "bf16": Scripted(lambda _: Turn(1.0, 1.0))}
    monkeypatch.setattr(Scripted, "__exit__", lambda *_: None)
    monkeypatch.setattr(runtime_speed, "Served", lambda kind, *_: served[kind])
    assert runtime_speed.main() == status
    assert ("slower than bf16: tiny awq" in capsys.readouterr().out) == bool(status)


def test_peak_memory_is_of_the_process_alone() -> None:
    # As many megabytes as it holds at once, none of which its parent has.
    program = "from evals.runtime_speed import peak_memory as p; a = p(); b = b'x' * 2**28; del b; print(p() - a)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert abs(int(done.stdout) - 2**28) < 2**24  # Linux counts pages in batches
    assert peak_memory() > 2**26


@pytest.mark.slow
def test_a_build_beside_the_model(tmp_path: Path) -> None:
    build = built(BUNDLED, tmp_path, "tiny", "gptq-act-order")
    with Served("packed", build, 1) as packed, Served("bf16", BUNDLED, 1) as bf16:
        row = compared("tiny", "gptq-act-order", packed, bf16, 1)
    assert 0 < row.tensors < row.tensors_bf16 < row.peak_bf16
    assert row.decode.processor > 0
    assert row.prefill.processor > row.decode.processor
