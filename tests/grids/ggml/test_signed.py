"""The lattices of IQ2 and IQ3: the nearest point, the signs, and where each bit of a block stands."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qconv.grids.ggml import GgmlType, encode, lattice, signed, signed_types
from qconv.grids.ggml.scaled import Moments
from tests.grids.ggml.conftest import (
    EVEN_SIGNS,
    SIGNED,
    bell_weights,
    column_importance,
    decode,
    lattice_points,
    squared_error,
)

every_type = pytest.mark.parametrize("type", list(SIGNED), ids=lambda type: type.name)
CPU = torch.device("cpu")


@every_type
def test_the_nearest_of_all_points(type: GgmlType) -> None:
    points = lattice_points(type)
    generator = torch.Generator().manual_seed(0)
    scale = points.max() / 2.5
    # Targets below zero are those of weights with a wrong sign.
    target = (torch.randn(points.shape[1], 3000, generator=generator) + 0.7) * scale
    importance = torch.exp(2.0 * torch.randn(target.shape, generator=generator))
    codes = lattice.lattice(type, CPU).nearest(2.0 * importance * target, importance)
    gains: Any = 2.0 * (importance * target).t().double().numpy() @ points.T
    gains -= importance.t().double().numpy() @ (points**2).T
    found = np.take_along_axis(gains, codes.numpy()[:, None], 1)[:, 0]
    terms = importance.sum(0).numpy() * points.max() ** 2
    assert (found >= gains.max(1) - 1e-6 * terms).all()  # another point only where float32 cannot tell
    assert (codes.numpy() == gains.argmax(1)).mean() > 0.999
    assert len(np.unique(codes.numpy())) > 0.4 * len(points)


@every_type
def test_of_equal_points_the_first(type: GgmlType) -> None:
    zeros = torch.zeros(lattice_points(type).shape[1], 40)
    assert lattice.lattice(type, CPU).nearest(zeros, zeros).tolist() == [0] * 40


@every_type
def test_pieces_make_no_difference(type: GgmlType, monkeypatch: pytest.MonkeyPatch) -> None:
    points = lattice.lattice(type, CPU)
    generator = torch.Generator().manual_seed(0)
    linear = torch.rand(points.elements, 1000, generator=generator)
    whole = points.nearest(linear, linear / 50.0)
    monkeypatch.setattr(lattice, "_SCORES", 7 * len(points.low))
    assert torch.equal(points.nearest(linear, linear / 50.0), whole)


@every_type
def test_moments_are_those_of_the_points(type: GgmlType) -> None:
    weight = bell_weights(8, 256).abs().t()[:32].contiguous()
    importance = torch.exp(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    target = lattice.Target(lattice.lattice(type, CPU), importance * weight, importance)
    scales = torch.stack([weight.amax(0) / 40.0, weight.amax(0) / 20.0])
    found = target.moments(scales)
    values = target.values(target.codes(scales))
    torch.testing.assert_close(found.xq, (importance * weight * values).sum(1))
    torch.testing.assert_close(found.qq, (importance * values * values).sum(1))
    # All at the lowest level is what scales far too large lead to.
    lowest = target.lowest()
    far = target.moments(weight.amax(0, keepdim=True))
    torch.testing.assert_close(Moments(far.qq[0], far.xq[0]).optimum(), lowest.optimum())


@every_type
def test_the_gguf_package_finds_every_part_where_it_stands(type: GgmlType) -> None:
    unit, size = SIGNED[type]
    points = torch.from_numpy(lattice_points(type))
    generator = torch.Generator().manual_seed(0)
    subblocks, groups, blocks = 256 // size, size // points.shape[1], 64
    negative = torch.rand(size, subblocks, blocks, generator=generator) < 0.5
    if type in EVEN_SIGNS:
        eights = negative.view(-1, 8, subblocks, blocks)
        eights[:, 7] = eights[:, :7].sum(1) % 2 == 1
    found = signed.Encoded(
        codes=torch.randint(0, len(points), (groups, subblocks, blocks), generator=generator),
        negative=negative,
        k=torch.randint(0, 16, (subblocks, blocks), generator=generator).float(),
        d=torch.rand(blocks, generator=generator).half().float(),
    )
    encoded = getattr(signed_types, type.name.lower())(found)
    values = points[found.codes].transpose(2, 3).transpose(1, 2)  # [groups, elements, sub-blocks, blocks]
    values = values.reshape(size, subblocks, blocks) * torch.where(negative, -1.0, 1.0)
    expected = values * (found.d * unit * (2.0 * found.k + 1.0))
    assert torch.equal(decode(encoded, type), expected.permute(2, 1, 0).reshape(blocks, 256).float())


@pytest.mark.parametrize("type", EVEN_SIGNS, ids=lambda type: type.name)
@pytest.mark.parametrize("precious", [False, True])
def test_the_cheapest_of_eight_takes_the_wrong_sign(type: GgmlType, precious: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = 1.0 + 0.2 * torch.rand(4, 32, 8, generator=generator)
    weight[..., 5] = -1.0  # one negative weight of eight
    cheap = torch.randint(0, 8, (32,), generator=generator)
    importance = torch.ones(32, 8)
    if precious:
        importance[torch.arange(32), cheap] = 1e-3
    else:
        weight[:, torch.arange(32), cheap] *= 0.1
    decoded = decode(encode(weight.view(4, 256), type, importance.view(256)), type).view(4, 32, 8)
    wrong = torch.sign(decoded) != torch.sign(weight)
    assert bool((wrong.sum(2) == 1).all())
    assert torch.equal(wrong.int().argmax(2), cheap.expand(4, 32).int().long())


@pytest.mark.parametrize("type", [type for type in SIGNED if type not in EVEN_SIGNS], ids=lambda type: type.name)
def test_free_signs_are_kept(type: GgmlType) -> None:
    weight = bell_weights()
    assert torch.equal(torch.sign(decode(encode(weight, type), type)), torch.sign(weight))


@pytest.mark.parametrize("type", EVEN_SIGNS, ids=lambda type: type.name)
def test_even_signs_are_kept(type: GgmlType) -> None:
    weight = bell_weights().view(8, 64, 8).abs()
    weight[:, :, 2::3] *= -1.0  # elements 2 and 5
    decoded = decode(encode(weight.view(8, 512), type), type)
    assert torch.equal(torch.sign(decoded), torch.sign(weight.view(8, 512)))


@every_type
@pytest.mark.parametrize("factor", [0.99, 0.996, 1.004, 1.01])
def test_no_other_scale_of_the_super_block_is_better(type: GgmlType, factor: float) -> None:
    weight, importance = bell_weights(64, 256), column_importance(256)
    encoded = encode(weight, type, importance)
    other = encoded.clone()
    d = other[:, :2].contiguous().view(torch.float16).float() * factor  # 0.001 more or less is float16's rounding
    other[:, :2] = d.half().view(torch.uint8)
    ours, theirs = (squared_error(weight, each, type, importance) for each in (encoded, other))
    assert bool((ours < theirs).all())


def test_two_levels_of_one_magnitude_are_exact_where_the_lattice_has_them() -> None:
    weight: Tensor = torch.sign(bell_weights(4, 256)) * 0.0137
    for type in (GgmlType.IQ3_S, GgmlType.IQ2_S):
        torch.testing.assert_close(decode(encode(weight, type), type), weight, rtol=1e-3, atol=0.0)
