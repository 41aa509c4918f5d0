"""Columns rounded in turn by C++: what torch does, but for ties, on any number of rows, columns and threads."""

from __future__ import annotations

import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qconv import native
from qconv.core.grid import Fit, Run
from qconv.core.settings import GptqSettings, RefineSettings
from qconv.grids import turns
from qconv.methods.compensated.problem import Problem
from tests.compiled import by_torch, compile_for, require
from tests.problems import FITTED, LATTICES, random_hessian, random_weight

PROCESSORS = ("x86-64", "x86-64-v3")  # 4 lanes, 8 lanes; 16 with AVX-512


@pytest.fixture(autouse=True, scope="module")
def library() -> None:
    """Without it, everything here would compare torch with torch."""
    require(turns.LIBRARY)


def fit_of(name: str, rows: int) -> Fit[Any]:
    weight = random_weight(rows, 256, seed=1)
    return FITTED[name].fit(weight, FITTED[name].encode(weight))


def run_of(fit: Fit[Any], rows: int, start: int, stop: int, share: float, bounded: bool = False) -> Run:
    """Columns in an order of their own, each taking up a little of all before it."""
    generator = torch.Generator().manual_seed(rows)
    count, width = stop - start, fit.width
    order = torch.randperm(count // width, generator=generator).unsqueeze(1) * width + torch.arange(width)
    moments = random_hessian(count, seed=2)
    return Run(
        (order.flatten() + start).tolist(),
        1.3 * random_weight(count, rows, seed=3),
        random_weight(count, rows, seed=4),
        share * torch.randn(count, count, generator=generator),
        moments.diagonal().contiguous(),
        moments if bounded else None,
    )


def copied(run: Run) -> Run:
    """``in_turn`` overwrites targets."""
    return Run(run.columns, run.targets.clone(), run.original, run.shares, run.metric, run.hessian)


@pytest.mark.parametrize("rows", [1, 15, 64, 131])
@pytest.mark.parametrize("name", FITTED)
def test_columns_alone_get_torchs_values(name: str, rows: int) -> None:
    fit = fit_of(name, rows)
    for start, stop in ((0, 256), (8, 40)):
        run = run_of(fit, rows, start, stop, share=0.0)
        assert torch.equal(fit.round_(copied(run)), by_torch(fit.round_, copied(run)))


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("name", FITTED)
def test_shares_are_taken_up_as_torch_does(name: str, bounded: bool) -> None:
    fit = fit_of(name, rows=64)
    run = run_of(fit, 64, 0, 256, share=0.1, bounded=bounded)
    ours, theirs = fit.round_(copied(run)), by_torch(fit.round_, copied(run))
    # A target in the middle between two values goes the other way, and with it the rest of its row.
    assert int((ours != theirs).any(0).sum()) <= 3
    alone = fit.round_(run_of(fit, 64, 0, 256, share=0.0, bounded=bounded))
    assert int((ours != alone).any(0).sum()) == 64


@pytest.mark.parametrize("name", LATTICES)
def test_eights_stay_where_moving_would_not_pay(name: str) -> None:
    fit = fit_of(name, rows=64)
    free, bounded = (run_of(fit, 64, 0, 256, 0.0, bounded) for bounded in (False, True))
    free.original = bounded.original = free.targets + 0.002  # so near to the optimum that some points are farther off
    moved, held = (fit.round_(copied(run)).view(-1, 8, 64) for run in (free, bounded))
    assert bounded.hessian is not None
    original, optimum = (part.view(-1, 8, 64).double() for part in (bounded.original, bounded.targets))
    own = torch.stack([bounded.hessian[at : at + 8, at : at + 8].double() for at in range(0, 256, 8)])

    def cost(values: Tensor) -> Tensor:
        off = values.double() - optimum
        return (off * (own @ off)).sum(1)

    stays = (held == original).all(1)
    assert bool((cost(held) <= cost(original) * (1.0 + 1e-5)).all())
    assert bool((stays | (held == moved).all(1)).all())
    assert bool((cost(moved)[stays] >= cost(original)[stays] * (1.0 - 1e-5)).all())
    assert bool(stays.any())


@pytest.mark.parametrize("name", ["Q4_K", "IQ3_S", "NVFP4"])
def test_threads_do_not_disturb_each_other(name: str) -> None:
    weights, hessian = [random_weight(40, 256, seed) for seed in range(4)], random_hessian(256, seed=5)
    problem = Problem(hessian, GptqSettings(), RefineSettings(sweeps=1, refits=1), {})

    def rounded(weight: Tensor) -> Tensor:
        found: Tensor = problem.quantize(weight, FITTED[name]).weight.dequantize()
        return found

    expected = list(map(rounded, weights))
    with ThreadPoolExecutor(4) as threads:
        assert all(map(torch.equal, threads.map(rounded, weights), expected))


@pytest.mark.slow  # each compiles the library anew
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 processors")
@pytest.mark.parametrize("processor", PROCESSORS)
def test_the_values_do_not_depend_on_the_vectors(
    processor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = {name: fit_of(name, rows=37) for name in FITTED}
    runs = {name: run_of(fit, 37, 0, 256, 0.1, bounded=True) for name, fit in fits.items()}
    expected = {name: fit.round_(copied(runs[name])) for name, fit in fits.items()}
    compile_for(processor, turns.LIBRARY, tmp_path, monkeypatch)
    assert native.load(turns.LIBRARY) is not None
    for name, fit in fits.items():
        assert torch.equal(fit.round_(copied(runs[name])), expected[name]), name
