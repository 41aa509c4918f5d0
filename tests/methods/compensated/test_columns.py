"""Compensation on fixed scales against elimination on the inverse Hessian, for grids of every width."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qconv.core.grid import Run
from qconv.core.hessian import factorize
from qconv.core.settings import GptqSettings
from qconv.methods.compensated.columns import compensate_
from tests.problems import FITTED, LATTICES, STEPS, random_hessian, random_weight

SOME = ["Q4_K", "Q6_K", "IQ4_XS", "int4 g128 zero points", "int4 act_order", "E4M3 128x128", "NVFP4"]


def eliminated(weight: Tensor, fit: object, hessian: Tensor, order: Tensor, width: int) -> Tensor:
    """The paper's procedure (equations 2 and 3) in float64, some columns at a time: [out_features, in_features].

    Quantize the columns g; add ``-(w_g - quant(w_g)) [H^-1]_gg^-1 [H^-1]_g,:`` to the others; take g out of H^-1.
    """
    inverse = torch.linalg.inv(hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(len(hessian)))
    current, result = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    for start in range(0, len(order), width):
        group = order[start : start + width]
        curvature = torch.linalg.inv(inverse[group][:, group])
        targets = current[:, group].float().t().contiguous()
        run = Run(group.tolist(), targets, targets, torch.zeros(width, width), curvature.diagonal().float())
        result[:, group] = fit.round_(run).t().double()  # type: ignore[attr-defined]
        share = curvature @ inverse[group]
        current -= (current[:, group] - result[:, group]) @ share
        inverse -= inverse[:, group] @ share
    return result


@pytest.mark.parametrize("name", [*SOME, *LATTICES])
@pytest.mark.parametrize("block_size", [24, 128])
def test_it_rounds_as_the_paper_does(name: str, block_size: int) -> None:
    weight, hessian = random_weight(24, 256, seed=1), random_hessian(256, seed=1)
    grid = FITTED[name]
    fit = grid.fit(weight, grid.encode(weight, hessian.diagonal().sqrt()))
    factor = factorize(hessian, GptqSettings(), fit.width)
    ours = compensate_(weight.t().contiguous(), fit, factor, block_size).t()
    theirs = eliminated(weight, fit, hessian, factor.order, fit.width)
    # Where float32 meets a tie the other way the row goes its own way from there.
    apart = (ours.double() - theirs).abs().amax(1) > 1e-6
    assert int(apart.sum()) <= 2
    assert factor.order.tolist() != sorted(factor.order.tolist())


@pytest.mark.parametrize("name", ["Q4_K", "IQ3_S", "E4M3 per tensor"])
def test_the_block_size_does_not_matter(name: str) -> None:
    weight, hessian = random_weight(24, 256, seed=2), random_hessian(256, seed=2)
    fit = FITTED[name].fit(weight, FITTED[name].encode(weight))
    factor = factorize(hessian, GptqSettings(), fit.width)
    first, *others = (compensate_(weight.t().contiguous(), fit, factor, size) for size in (8, 1, 100, 128, 1000))
    for other in others:
        assert int((other != first).any(0).sum()) <= 2


def test_lattices_are_rounded_in_the_order_of_their_eights() -> None:
    hessian = random_hessian(256, seed=3)
    order = factorize(hessian, GptqSettings(), 8).order.view(-1, 8)
    assert torch.equal(order - order[:, :1], torch.arange(8).expand_as(order))
    sums = hessian.diagonal().view(-1, 8).sum(1)[order[:, 0] // 8]
    assert torch.equal(sums, sums.sort(descending=True).values)


@pytest.mark.parametrize("name", STEPS)
def test_uncorrelated_inputs_leave_the_nearest_values(name: str) -> None:
    weight = random_weight(3, 256, seed=4)
    fit = FITTED[name].fit(weight, FITTED[name].encode(weight))
    columns = weight.t().contiguous()
    values = compensate_(columns.clone(), fit, factorize(torch.eye(256), GptqSettings()))
    alone = Run(range(256), columns.clone(), columns, torch.zeros(256, 256), torch.ones(256))
    assert torch.equal(values, fit.round_(alone))
