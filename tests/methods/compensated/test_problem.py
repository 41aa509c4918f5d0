"""A weight on any grid by compensation and refinement: never worse than its own rounding, and far better."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qconv.core.qtensor import Grid
from qconv.core.settings import GptqSettings, RefineSettings
from qconv.errors import QconvError
from qconv.grids.elements import IntegerGrid
from qconv.methods import gptq
from qconv.methods.compensated.problem import Problem
from tests.problems import (
    FITTED,
    HESSIANS,
    WEIGHTS,
    random_hessian,
    random_weight,
    rounding_noise,
    true_errors,
    weight_of_kind,
)


def problem(hessian: torch.Tensor, sweeps: int = 0, refits: int = 0, **named: Any) -> Problem:
    return Problem(hessian, GptqSettings(**named), RefineSettings(sweeps=sweeps, refits=refits), {})


@settings(max_examples=60)
@given(
    name=st.sampled_from(list(FITTED)),
    kind=st.sampled_from(WEIGHTS),
    hessian_kind=st.sampled_from(HESSIANS),
    refine=st.sampled_from([(0, 0), (1, 0), (2, 1), (0, 1)]),
    ordering=st.sampled_from(["none", "static"]),
    block_size=st.integers(1, 300),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
    seed=st.integers(0, 10**6),
)
def test_never_worse_than_the_grids_own_rounding(
    name: str,
    kind: str,
    hessian_kind: str,
    refine: tuple[int, int],
    ordering: Any,
    block_size: int,
    scale: float,
    seed: int,
) -> None:
    weight, hessian = weight_of_kind(kind, 3, 256, seed), random_hessian(256, seed, hessian_kind) * scale
    before = weight.clone(), hessian.clone()
    found = problem(hessian, *refine, ordering=ordering, block_size=block_size).quantize(weight, FITTED[name])
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
    importance = hessian.diagonal().sqrt() if hessian_kind != "no tokens" else None
    ours, own = found.weight.dequantize(), FITTED[name].encode(weight, importance).dequantize()
    assert bool(torch.isfinite(ours).all())
    errors, own_errors = true_errors(ours, weight, hessian), true_errors(own, weight, hessian)
    noise = rounding_noise(ours - weight, hessian), rounding_noise(own - weight, hessian)
    assert bool((errors <= own_errors + noise[0] + noise[1]).all())
    assert found.error <= found.own_error
    assert abs(found.error - float(errors.sum())) <= float(noise[0].sum())
    assert abs(found.own_error - float(own_errors.sum())) <= float(noise[1].sum())


@pytest.mark.parametrize("name", FITTED)
def test_it_is_far_better_on_correlated_inputs(name: str) -> None:
    weight, hessian = random_weight(12, 256, seed=3), random_hessian(256, seed=3)
    plain, swept, refitted = (
        problem(hessian, *refine).quantize(weight, FITTED[name]) for refine in ((0, 0), (2, 0), (2, 2))
    )
    assert plain.kept_own == 0
    # Measured: 0.06 to 0.28 of the grid's own error; then 0.64 to 0.94 of that, and 0.88 to 0.998 of that.
    assert plain.error < 0.35 * plain.own_error
    assert swept.error < 0.96 * plain.error
    shared = name in ("E4M3 128x128", "E4M3 32x96, searched", "E4M3 per tensor")  # nothing to refit, but more sweeps
    assert refitted.error < swept.error * (1.0 if shared else 0.999)


@pytest.mark.parametrize("name", ["Q3_K", "IQ2_S", "int4 act_order", "NVFP4"])
def test_rows_that_its_own_rounding_serves_better_are_kept(name: str) -> None:
    weight, hessian = random_weight(16, 256, seed=4), random_hessian(256, seed=4)
    misled = problem(hessian)
    # Compensation for other inputs misleads.
    other = problem(random_hessian(256, seed=40))
    for width in (1, 8):
        misled.factors[width] = other.factor(width)
    found = misled.quantize(weight, FITTED[name])
    own = FITTED[name].encode(weight, hessian.diagonal().sqrt())
    same = (found.weight.dequantize() == own.dequantize()).all(1)
    assert 0 < found.kept_own <= int(same.sum())
    assert found.error <= found.own_error


@pytest.mark.parametrize("name", ["Q4_0", "IQ3_S", "E4M3 128x128"])
def test_refinement_keeps_the_rows_that_it_would_make_worse(name: str) -> None:
    weight, hessian = random_weight(24, 256, seed=9), random_hessian(256, seed=9)
    # The descent is on damped moments: with so much damping it is none on those that count.
    plain, refined = (problem(hessian, sweeps, damp_percent=0.9).quantize(weight, FITTED[name]) for sweeps in (0, 3))
    before, after = (true_errors(one.weight.dequantize(), weight, hessian) for one in (plain, refined))
    assert bool((after <= before * (1.0 + 1e-6)).all())
    assert 0 < int((after == before).sum()) < 24


@pytest.mark.parametrize("ordering", ["none", "static", "desc_act"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_gptq_made_is_refined(ordering: Any, symmetric: bool) -> None:
    weight, hessian = random_weight(24, 256, seed=5), random_hessian(256, seed=5)
    grid = Grid(4, 64, symmetric, torch.float16, act_order=ordering == "desc_act")
    made = gptq.quantize(weight, grid, hessian, GptqSettings(ordering=ordering))
    refining = problem(hessian, 2, 2, ordering=ordering)
    refined, error = refining.refined(weight, IntegerGrid(grid), made.qtensor)
    true = float(true_errors(refined.dequantize(), weight, hessian).sum())
    assert error == pytest.approx(true, rel=1e-4)
    assert error < 0.95 * made.error
    assert refined.grid == grid
    untouched, same = problem(hessian, ordering=ordering).refined(weight, IntegerGrid(grid), made.qtensor)
    assert torch.equal(untouched.codes, made.qtensor.codes)
    assert same == pytest.approx(made.error, rel=1e-6)


def test_linears_of_one_input_share_its_factor() -> None:
    weights = {"gate": random_weight(4, 256, seed=6), "up": random_weight(6, 256, seed=7)}
    shared = problem(random_hessian(256, seed=6))
    grids = {"gate": FITTED["Q4_K"], "up": FITTED["IQ3_S"]}
    found = {name: shared.quantize(weight, grids[name]) for name, weight in weights.items()}
    assert found["gate"].factor is shared.factor(1)
    assert found["up"].factor is shared.factor(8)
    assert list(shared.factors) == [1, 8]


def test_infinite_weights_and_moments_are_refused() -> None:
    weight = random_weight(2, 256, seed=8)
    weight[1, 5] = torch.inf
    with pytest.raises(QconvError, match="the weight holds values that are not finite"):
        problem(torch.eye(256)).quantize(weight, FITTED["Q4_K"])
    with pytest.raises(QconvError, match="the Hessian holds values that are not finite"):
        problem(torch.full((256, 256), torch.nan)).quantize(weight.clamp(max=1.0), FITTED["Q4_K"])
