"""IQ1: points of -1, 0 and 1, the shift, and where each bit of a block stands."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qconv.grids.ggml import GgmlType, encode, shifted, shifted_types
from qconv.grids.ggml.fields import read_scales, read_shifts
from tests.grids.ggml.conftest import SHIFTED, bell_weights, column_importance, decode, lattice_points, squared_error

every_type = pytest.mark.parametrize("type", list(SHIFTED), ids=lambda type: type.name)


def random_found(type: GgmlType, blocks: int) -> shifted.Encoded:
    """Every part of so many blocks at random."""
    generator = torch.Generator().manual_seed(0)
    size, together = SHIFTED[type]
    subblocks, groups = 256 // size, size // 8
    negative = torch.rand(size // together, subblocks, blocks, generator=generator) < 0.5
    return shifted.Encoded(
        codes=torch.randint(0, 2048, (groups, subblocks, blocks), generator=generator),
        negative=negative.repeat_interleave(together // 8, 0),
        k=torch.randint(0, 8, (subblocks, blocks), generator=generator).float(),
        d=torch.rand(blocks, generator=generator).half().float(),
    )


@every_type
def test_the_gguf_package_finds_every_part_where_it_stands(type: GgmlType) -> None:
    found, points = random_found(type, 64), torch.from_numpy(lattice_points(type)).float()
    encoded = getattr(shifted_types, type.name.lower())(found)
    values = points[found.codes] + torch.where(found.negative, -0.125, 0.125).unsqueeze(-1)  # [groups, s, blocks, 8]
    expected = values.permute(2, 1, 0, 3).flatten(2) * (found.d * (2.0 * found.k + 1.0)).t().unsqueeze(2)
    assert torch.equal(decode(encoded, type), expected.flatten(1))


@every_type
def test_scales_and_shifts_are_read_back(type: GgmlType) -> None:
    found = random_found(type, 64)
    encoded = getattr(shifted_types, type.name.lower())(found)
    scales = read_scales(encoded, type)
    assert torch.equal(scales.d, found.d)
    assert torch.equal(scales.multiples, 2.0 * found.k + 1.0)
    shifts = read_shifts(encoded, type)
    if type is GgmlType.IQ1_S:
        assert shifts is not None
        assert torch.equal(shifts, torch.where(found.negative[0], -0.125, 0.125))
    else:
        assert shifts is None


@every_type
def test_the_best_of_all_points_and_shifts(type: GgmlType) -> None:
    size, together = SHIFTED[type]
    weights = bell_weights(8, 512).view(-1, size).t().contiguous()
    importance = torch.exp(torch.randn(weights.shape, generator=torch.Generator().manual_seed(0)))
    scale = weights.square().mean(0).sqrt() * 1.2
    source = shifted.Source.of(weights, importance, getattr(shifted_types, type.name))
    found = source.points(scale)
    places = lattice_points(type)
    x, cost = ((one.t().double().numpy().reshape(-1, size // 8, 8)) for one in (weights, importance))
    step = scale.double().numpy()[:, None, None]
    losses = []
    for shift in (0.125, -0.125):
        at = step[..., None] * (places + shift)
        losses.append(((x[:, :, None] - at) ** 2 * cost[:, :, None]).sum(3).min(2))
    if together == size:
        best = np.minimum(losses[0].sum(1), losses[1].sum(1))
    else:
        best = np.minimum(losses[0], losses[1]).sum(1)
    ours = ((weights - found.values * scale).square() * importance).sum(0).double().numpy()
    assert np.allclose(ours, best, rtol=1e-4)
    shifts = torch.where(found.negative, -0.125, 0.125).repeat_interleave(8, 0)
    assert torch.equal(found.values - shifts, (found.values - shifts).round())


@every_type
@pytest.mark.parametrize("factor", [0.98, 0.99, 1.01, 1.02])
def test_no_other_scale_of_the_super_block_is_better(type: GgmlType, factor: float) -> None:
    weight, importance = bell_weights(64, 256), column_importance(256)
    encoded = encode(weight, type, importance)
    ours = squared_error(weight, encoded, type, importance)
    values = decode(encoded, type).double()
    theirs = ((weight.double() - factor * values).square() * importance.double()).sum(1)
    assert bool((ours < theirs).all())


@every_type
def test_a_constant_of_either_sign_is_as_exact_as_its_scale(type: GgmlType) -> None:
    weight = torch.cat([torch.full((1, 256), 0.0137), torch.full((1, 256), -0.0137)])
    torch.testing.assert_close(decode(encode(weight, type), type), weight, rtol=1e-3, atol=0.0)
