"""Refinement: no step raises the loss, and where it ends nothing can be gained any more by one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from qconv.core.grid import Fit, Run, Surroundings
from qconv.methods.compensated.refinement import refine_
from tests.problems import FITTED, LATTICES, random_hessian, random_weight

DAMP = 0.01


def damped(hessian: Tensor) -> Tensor:
    return hessian.double() + DAMP * hessian.diagonal().double().mean() * torch.eye(len(hessian))


def losses(weight: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    """Of each row with transposed float32 matrices: float64 [out_features]."""
    error = weight.double() - values.double()
    raised = DAMP * hessian.diagonal().double().mean() * error.square()
    return (error * (hessian.double() @ error) + raised).sum(0)


def begun(name: str, rows: int = 6, columns: int = 512) -> tuple[Tensor, Tensor, Fit[Any], Tensor]:
    """A weight, its own rounding (both transposed), the fit, and second moments."""
    weight, hessian = random_weight(rows, columns, seed=1), random_hessian(columns, seed=1)
    own = FITTED[name].encode(weight)
    return weight.t().contiguous(), own.dequantize().t().contiguous(), FITTED[name].fit(weight, own), hessian


@dataclass(slots=True)
class Watched:
    """A fit that looks at what each of its steps does to the loss.

    Attributes:
        weight: What is approximated.
        values: What ``refine_`` changes in place.
        steps: How many steps were taken, and how many of them changed anything.
    """

    inner: Fit[Any]
    weight: Tensor
    values: Tensor
    hessian: Tensor
    steps: int = 0
    changes: int = 0

    @property
    def width(self) -> int:
        return self.inner.width

    @property
    def span(self) -> int:
        return self.inner.span

    def round_(self, run: Run) -> Tensor:
        # One column, or the eight of a lattice, after the other.
        values = self.inner.round_(run)
        candidate, columns = self.values.clone(), list(run.columns)
        loss = losses(self.weight, candidate, self.hessian)
        for start in range(0, len(columns), self.width):
            candidate[columns[start : start + self.width]] = values[start : start + self.width]
            loss = self._compared(loss, candidate)
        return values

    def refit_(self, first: int, around: Surroundings) -> None:
        before = self.values.clone()
        self.inner.refit_(first, around)
        self._compared(losses(self.weight, before, self.hessian), self.values)
        outside = torch.ones(len(before), dtype=torch.bool)
        outside[first : first + self.span] = False
        assert torch.equal(before[outside], self.values[outside])
        error = self.weight.double() - self.values.double()
        mean = self.hessian.diagonal().double().mean()
        gradient = (damped(self.hessian) @ error / mean)[around.first : around.first + len(around.values)]
        assert torch.allclose(around.gradient.double(), gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))

    def pack(self, values: Tensor) -> Any:
        return self.inner.pack(values)

    def _compared(self, before: Tensor, values: Tensor) -> Tensor:
        """The losses after a step."""
        after = losses(self.weight, values, self.hessian)
        assert bool((after <= before * (1.0 + 1e-5)).all())
        self.steps += 1
        self.changes += int((after < before).any())
        return after


@pytest.mark.parametrize("name", FITTED)
def test_every_step_lowers_the_loss(name: str) -> None:
    weight, values, fit, hessian = begun(name, rows=3, columns=256)
    watched = Watched(fit, weight, values, hessian)
    before = losses(weight, values, hessian)
    refine_(weight, values, watched, hessian, DAMP, sweeps=1, refits=1)
    assert watched.steps > 2 * 256 / fit.width
    assert watched.changes > watched.steps / 20
    # Measured: 0.09 to 0.51.
    assert float(losses(weight, values, hessian).sum()) < 0.7 * float(before.sum())
    assert torch.equal(fit.pack(values).dequantize(), values.t())


@pytest.mark.parametrize("name", ["Q4_0", "Q2_K", "int4 g128 zero points", "int4 act_order", "NVFP4"])
def test_at_the_end_no_column_has_a_better_value(name: str) -> None:
    weight, values, fit, hessian = begun(name, columns=256)
    refine_(weight, values, fit, hessian, DAMP, sweeps=20, refits=0)
    before = values.clone()
    refine_(weight, values, fit, hessian, DAMP, sweeps=1, refits=0)
    assert torch.equal(values, before)
    loss = losses(weight, values, hessian)
    grid = (torch.linspace(-1.0, 1.0, 80) * 2.0 * weight.abs().max()).unsqueeze(1).expand(80, 6)
    for column in range(0, 256, 37):
        zeros = torch.zeros(1, 1)
        tried = [fit.round_(Run([column], one.clone()[None], one[None], zeros, torch.ones(1))) for one in grid]
        for candidate in sorted({tuple(row) for row in torch.cat(tried).tolist()}):
            other = values.clone()
            other[column] = torch.tensor(candidate)
            assert bool((losses(weight, other, hessian) >= loss * (1.0 - 1e-6)).all())


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "IQ4_NL", "int3 per row"])
def test_a_scale_that_was_refitted_is_the_best_that_can_be_stored(name: str) -> None:
    weight, values, fit, hessian = begun(name, columns=256)
    hessian, mean = hessian / hessian.diagonal().mean(), hessian.diagonal().mean()
    around = Surroundings(0, hessian + DAMP * torch.eye(256), values, damped(hessian).float() @ (weight - values))
    fit.refit_(0, around)
    span, scales = fit.span, fit.scales  # type: ignore[attr-defined]
    codes = scales.codes(0, values[:span])
    bits = scales.steps[0].to(torch.bfloat16 if name == "int3 per row" else torch.float16)
    loss = losses(weight, values, hessian * mean)
    for by in (-2, -1, 1, 2):
        neighbour = (bits.view(torch.int16) + by).view(bits.dtype).float()
        other = values.clone()
        other[:span] = codes * neighbour
        assert bool((losses(weight, other, hessian * mean) >= loss * (1.0 - 1e-5)).all())


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
def test_a_scale_and_a_base_are_refitted_together(name: str) -> None:
    weight, values, fit, hessian = begun(name, columns=256)
    around = Surroundings(0, damped(hessian).float(), values, damped(hessian).float() @ (weight - values))
    before, codes = values.clone(), fit.scales.codes(0, values[:32]).double()  # type: ignore[attr-defined]
    fit.refit_(0, around)
    loss_before, loss_after = losses(weight, before, hessian), losses(weight, values, hessian)
    own, gradient = damped(hessian)[:32, :32], (damped(hessian) @ (weight.double() - before.double()))[:32]
    for row in range(6):
        basis = torch.stack([codes[:, row], torch.ones(32, dtype=torch.float64)], 1)
        slope = basis.t() @ gradient[:, row]
        possible = slope @ torch.linalg.solve(basis.t() @ own @ basis, slope)  # of real steps and bases
        # Float16 numbers are near enough to the optimum to keep nearly all of it.
        assert float(loss_before[row] - loss_after[row]) > 0.95 * float(possible)


@pytest.mark.parametrize("name", [*LATTICES, "Q4_K", "Q3_K", "Q4_1"])
def test_more_is_never_worse(name: str) -> None:
    weight, own, _, hessian = begun(name, columns=256)
    found = []
    for sweeps, refits in ((0, 0), (1, 0), (2, 1)):
        _, values, fit, _ = begun(name, columns=256)
        refine_(weight, values, fit, hessian, DAMP, sweeps, refits)
        found.append(float(losses(weight, values, hessian).sum()))
    assert float(losses(weight, own, hessian).sum()) == found[0]
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == len(found)


def test_inputs_that_were_always_zero_take_the_nearest_values() -> None:
    weight, values, fit, hessian = begun("Q4_0", columns=64)
    dead = torch.arange(0, 64, 3)
    hessian[dead] = 0.0
    hessian[:, dead] = 0.0
    nearest = fit.round_(Run(range(64), weight.clone(), weight, torch.zeros(64, 64), torch.ones(64)))
    refine_(weight, values, fit, hessian, DAMP, sweeps=3, refits=0)
    assert torch.equal(values[dead], nearest[dead])
