"""The scale script's own arithmetic: weights counted, limits applied, results kept by case."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from evals.scale import GIB, Result, quantized_weights, read_through, store
from qconv.building.bench import SliceShape
from qconv.models import architecture

RESULT = Result(
    case="rtn",
    layers=1,
    experts=160,
    seconds=50.0,
    peak_memory=2 * GIB,
    weights=7_700_000_000,
    source_size=10,
    build_size=5,
    cached=True,
    cores=2,
    memory=24 * GIB,
)


def test_weights_are_those_of_the_architecture() -> None:
    config = SliceShape().config(layers=2, experts=3)
    layers = architecture(config).layers
    assert quantized_weights(config) == sum(linear.numel for layer in layers for linear in layer.linears())


def test_limits() -> None:
    assert RESULT.problems() == []
    assert replace(RESULT, peak_memory=5 * GIB).problems() == ["more than 4 GiB"]
    assert replace(RESULT, case="awq", peak_memory=5 * GIB).problems() == []
    assert replace(RESULT, seconds=100).problems() == ["below 100 million weights/s"]
    assert replace(RESULT, seconds=100, cached=False).problems() == []  # then the disk is measured, not qconv


def test_a_case_run_again_replaces_its_result_and_no_other(tmp_path: Path) -> None:
    for result in (RESULT, replace(RESULT, case="awq"), replace(RESULT, layers=2), replace(RESULT, seconds=77.0)):
        store(tmp_path, result)
    table = (tmp_path / "scale.md").read_text().splitlines()
    assert len(table) == 2 + 3
    assert [line.split("|")[2].strip() for line in table[2:]] == ["1 x 160", "1 x 160", "2 x 160"]
    assert "| 77 | 100 | 2.00 |" in table[3]
    assert "| 50 |" not in table[3]


def test_files_are_read_to_their_ends(tmp_path: Path) -> None:
    sizes = (0, 1, 8 * 2**20 + 1)  # nothing, a byte, one more than the buffer
    for size in sizes:
        (tmp_path / str(size)).write_bytes(bytes(size))
    assert read_through(tmp_path.iterdir()) == sum(sizes)


def test_importing_the_script_loads_nothing_heavy() -> None:
    """A child's maximum resident set starts at its parent's, so the parent must be small."""
    code = "import sys, evals.scale; sys.exit(' '.join({'torch', 'numpy', 'transformers'} & set(sys.modules)) or 0)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
