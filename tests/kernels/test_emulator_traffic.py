"""What the kernels move through memory, counted by the emulator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from qconv.runtime.kernel_interface import ROW_TILES, entry_name
from tests.kernels.emulator import KERNELS
from tests.kernels.products import CASES, Result, activations, case, run_dense

pytestmark = pytest.mark.kernels

LAYOUTS = tuple(CASES)
COLUMNS, DEPTH = 256, 1024  # as the budgets are counted
SECTOR = 32


def product(layout: str, row_tile: int) -> Result:
    """A full row tile, two tiles of outputs, sixteen of inputs."""
    tokens = activations(row_tile, DEPTH, torch.float16)
    return run_dense(case(layout, COLUMNS, DEPTH, 128), tokens, row_tile, traffic=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("row_tile", ROW_TILES)
def test_traffic(layout: str, row_tile: int) -> None:
    """Whole sectors only, no bank conflict, every byte of the weight exactly once, and what the budgets say."""
    result = product(layout, row_tile)
    report, packed = result.report, case(layout, COLUMNS, DEPTH, 128).packed
    assert report.conflicts() == []
    for kind in ("ld.global", "st.global"):
        assert report.units(kind) == report.ideal(kind)

    planes = {name: getattr(packed, name) for name in ("weights", "weights_high", "scales", "offsets")}
    sizes = {name: plane.nbytes for name, plane in planes.items() if plane is not None}
    for name, size in sizes.items():
        assert report.touched[name] == size, name

    # Codes are read once. Parameters of a group that reaches over tiles are read once a tile, with the next group's.
    activations_moved = row_tile * DEPTH * 2 * (COLUMNS // 128)
    of_tiles = moved(result, "ld.global") - activations_moved - codes(sizes)
    parameters = sum(sizes.values()) - codes(sizes)
    assert parameters <= of_tiles <= 4 * parameters

    compulsory = sum(sizes.values()) + row_tile * (DEPTH + COLUMNS) * 2
    ratio = (moved(result, "ld.global") + moved(result, "st.global")) / compulsory
    # The budgets hold what an interpreter of the emitted PTX counts, to three decimals.
    assert abs(ratio - budget(entry_name(layout, row_tile, torch.float16))) < 1e-3


def moved(result: Result, kind: str) -> int:
    """Bytes."""
    return result.report.units(kind) * SECTOR


def codes(sizes: dict[str, int]) -> int:
    """Bytes of codes."""
    return sizes["weights"] + sizes.get("weights_high", 0)


def budget(entry: str) -> float:
    """Bytes moved over compulsory bytes that ``kernels/budgets.yaml`` grants."""
    budgets = yaml.safe_load(Path(KERNELS / "budgets.yaml").read_text())
    return float(budgets["kernels"][entry]["moved_over_compulsory"])
