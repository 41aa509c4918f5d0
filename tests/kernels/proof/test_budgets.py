"""Every kernel compiles for every target without spills, within kernels/budgets.yaml; the README shows that file."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from kernels.proof import budgets, table
from kernels.proof.budgets import ARCHITECTURES, Budget, Build, exceeded, measure, refreshed
from qconv.runtime.backends.cuda.sources import kernels_folder
from qconv.runtime.kernel_interface import ACTIVATIONS, TILE_BYTES, entry_name


@pytest.mark.kernels
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layout", budgets.layouts())
def test_nvrtc_builds_are_within_budget(layout: str, architecture: int) -> None:
    granted = budgets.read()
    builds = measure(layout, architecture)
    assert builds
    worse = [line for name, build in builds.items() for line in exceeded(name, architecture, build, granted.get(name))]
    assert not worse, "\n".join([*worse, "if that is meant: python -m kernels.proof.budgets --write"])


@pytest.mark.kernels
@pytest.mark.parametrize("layout", TILE_BYTES)
def test_traffic_is_within_budget(layout: str) -> None:
    granted = budgets.read()
    for name, rows, activations in budgets.entries(layout):
        ratio = granted[name].ratio
        assert ratio is not None
        assert budgets.traffic(layout, rows, activations).ratio <= ratio + 0.001, name  # three digits are kept


@pytest.mark.kernels
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
@pytest.mark.parametrize("layout", budgets.layouts())
def test_nvcc_builds_do_not_spill(layout: str, tmp_path: Path) -> None:
    targets = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in ARCHITECTURES]
    source = kernels_folder() / f"{layout}.cu"
    command = ["nvcc", "-std=c++17", "-Xptxas=-v", "-fatbin", *targets, "-o", str(tmp_path / "out"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    compiled = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", done.stderr)
    assert {int(architecture) for _, architecture in compiled} == set(ARCHITECTURES)
    assert len(spills) == len(compiled) == len(set(compiled))
    assert {numbers for numbers in spills} == {("0", "0", "0")}
    # ptxas is another version than NVRTC's here; registers may differ by a few, not by many.
    used = [int(count) for count in re.findall(r"Used (\d+) registers", done.stderr)]
    granted = budgets.read()
    for (name, architecture), count in zip(compiled, used, strict=True):
        assert count <= granted[name].builds[int(architecture)].registers + 16, name


def test_every_kernel_has_budgets_without_spills() -> None:
    granted = budgets.read()
    wanted = {name for layout in TILE_BYTES for name, _, _ in budgets.entries(layout)}
    assert wanted <= granted.keys()
    for name, budget in granted.items():
        assert set(budget.builds) == set(ARCHITECTURES), name
        assert all(build.spill_bytes == 0 for build in budget.builds.values()), name


@pytest.mark.parametrize("layout", TILE_BYTES)
def test_decode_is_bound_by_memory(layout: str) -> None:
    """On every chip the model leaves eight rows at least nine tenths of DRAM bandwidth."""
    granted = budgets.read()
    for activations in ACTIVATIONS:
        name = entry_name(layout, 8, activations)
        shares = {architecture: build.dram for architecture, build in granted[name].builds.items()}
        assert all(share is not None and share >= 0.9 for share in shares.values()), f"{name}: {shares}"


@pytest.mark.parametrize(
    ("layout", "rows", "share"),
    [
        ("awq", 8, 0.25),  # a warp goes through slabs of 32 inputs, four to a group of 128
        ("awq", 16, 0.5),  # every second one
        ("q6_k", 8, 0.25),  # once in the four tiles of a super-block
        ("q8_0", 16, 1.0),
    ],
)
def test_how_often_parameters_are_refreshed(layout: str, rows: int, share: float) -> None:
    assert refreshed(layout, rows) == share


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"registers": 129}, "129 registers, budget 128"),
        ({"spill_bytes": 8}, "8 bytes of local memory"),
        ({"warps": 12}, "12 resident warps, budget 16"),
        ({"dram": 0.6}, r"60.0% of DRAM bandwidth in the model, budget 70.0%"),
    ],
)
def test_what_is_worse_is_told(change: dict[str, float], words: str) -> None:
    granted = Build(registers=128, spill_bytes=0, warps=16, dram=0.7, bound="issue")
    budget = Budget(1.0, {90: granted})
    assert exceeded("k", 90, granted, budget) == []
    assert exceeded("k", 90, replace(granted, registers=100, warps=20, dram=0.9), budget) == []
    (line,) = exceeded("k", 90, replace(granted, **change), budget)  # type: ignore[arg-type]  # fields by name
    assert words in line
    assert exceeded("k", 80, granted, budget) == ["k has no budget for sm_80"]


def test_the_file_says_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    granted = budgets.read()
    monkeypatch.setattr(budgets, "PATH", tmp_path / "budgets.yaml")
    budgets.PATH.write_text(budgets.text(granted))
    assert budgets.read() == granted


def test_the_readme_shows_the_budgets() -> None:
    document = table.README.read_text()
    assert table.replaced(document, table.table(budgets.read())) == document, (
        "run: python -m kernels.proof.table --write"
    )
