"""Scoring a layer of the 480B's shapes in a process of its own, whose peak memory is measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qconv.building.bench import write_slice
from qconv.planning.recipe import load_recipe
from tests.conftest import build

SCORE = """
import resource, sys, torch
from qconv.runtime.stream import stream_windows
ids = torch.randint(0, 151936, (2, 256), generator=torch.Generator().manual_seed(0))
tokens = sum(len(window.logits) for window in stream_windows(sys.argv[1], list(ids)))
print(tokens, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_the_peak_is_far_below_4_gib(tmp_path: Path) -> None:
    write_slice(tmp_path / "slice", layers=1, experts=8)
    out = build(tmp_path / "slice", tmp_path / "build", load_recipe("awq", {"method": "rtn"})).out
    done = subprocess.run([sys.executable, "-c", SCORE, str(out)], check=True, capture_output=True, text=True)
    tokens, peak = map(int, done.stdout.split())
    assert tokens == 512
    assert peak < 4 * 2**30
