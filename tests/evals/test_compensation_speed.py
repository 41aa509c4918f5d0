"""The script that measures an expert: every way runs, and a way that is too slow is told."""

from __future__ import annotations

import sys

import pytest
from click.testing import CliRunner

from evals import compensation_speed
from evals.compensation_speed import BASELINE, Turn, main, turn


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("way", [BASELINE, "Q4_K", "IQ3_S + sweep", "NVFP4 + refit", "MXFP4", "E4M3"])
def test_every_way_runs_and_gains(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compensation_speed, "HIDDEN", 512)
    monkeypatch.setattr(compensation_speed, "WIDTH", 256)
    found = turn(way, tokens=700)
    assert 0.0 < found.error < 0.8  # the inputs are correlated
    assert found.seconds == found.moments + found.rounding > 0.0
    assert found.peak >= 0


@pytest.mark.parametrize(("seconds", "code"), [([10.0, 12.9], 0), ([10.0, 13.1], 1), ([13.0, 13.1, 9.0, 13.1], 1)])
def test_the_best_turns_are_compared(seconds: list[float], code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = iter(seconds)
    monkeypatch.setattr(
        compensation_speed, "in_a_process", lambda way, tokens: Turn(1.0, next(turns) - 1.0, 500_000_000, 0.5)
    )
    shown = CliRunner().invoke(main, ["--turns", str(len(seconds) // 2)])
    assert shown.exit_code == code
    assert "| Q4_K | 1.0 |" in shown.output
