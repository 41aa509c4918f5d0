"""What every grid owes to the methods that round on it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qconv.core.grid import Packed, Run
from qconv.core.qtensor import QTensor
from qconv.errors import UsageError
from qconv.grids.blocks import BlockGrid, BlockTensor
from qconv.grids.ggml import GgmlType
from tests.problems import FITTED, STEPS, WEIGHTS, random_weight, weight_of_kind

COLUMNS = 512
LEVELS = {
    "Q8_0": 255,
    "Q4_0": 16,
    "Q4_1": 16,
    "Q5_0": 32,
    "Q5_1": 32,
    "IQ4_NL": 16,
    "IQ4_XS": 16,
    "MXFP4": 15,
    "TQ1_0": 3,
    "TQ2_0": 3,
    "Q2_K": 4,
    "Q3_K": 8,
    "Q4_K": 16,
    "Q5_K": 32,
    "Q6_K": 64,
    "int4 g128": 16,
    "int4 g128 zero points": 16,
    "int3 per row": 8,
    "int8 g32 zero points": 256,
    "int4 act_order": 16,
    "affine4 g64": 16,
    "affine3 g32, searched": 8,
    "affine8 g128": 256,
    "E4M3 128x128": 253,  # 256 without two NaNs and a second zero
    "E4M3 32x96, searched": 253,
    "E4M3 per row": 253,
    "MXFP8": 253,
    "E4M3 per tensor": 253,
    "NVFP4": 15,
    "NVFP4 plain": 15,
    "NVFP4 shared": 15,
    "MXFP4 searched": 15,
    "MXFP4 plain": 15,
}


def alone(first: int, targets: Tensor) -> Run:
    """Columns that take up nothing of each other."""
    count = len(targets)
    nothing = torch.zeros(count, count)
    return Run(range(first, first + count), targets.clone(), torch.zeros_like(targets), nothing, torch.ones(count))


def stored(weight: Packed) -> list[Tensor]:
    """The tensors that files hold, as bytes."""
    if isinstance(weight, BlockTensor):
        return [weight.data]
    assert isinstance(weight, QTensor)
    fields = [getattr(weight, name) for name in weight.__slots__]
    return [field.flatten().view(torch.uint8) for field in fields if isinstance(field, Tensor) and field.dim()]


@pytest.mark.parametrize("name", FITTED)
def test_its_own_rounding_is_packed_to_the_same_bytes(name: str) -> None:
    weight = random_weight(9, COLUMNS, seed=1)
    for importance in (None, torch.linspace(3.0, 1.0, COLUMNS)):
        own = FITTED[name].encode(weight, importance)
        again = FITTED[name].fit(weight, own).pack(own.dequantize().t().contiguous())
        for ours, theirs in zip(stored(again), stored(own), strict=True):
            # E4M3 has a second zero, which the encoder keeps for small negative weights.
            different = ours != theirs
            assert not different.any() or (
                name.startswith(("E4M3", "MXFP8")) and bool((theirs[different] == 128).all())
            )


@pytest.mark.parametrize(
    "name", ["Q8_0", "Q4_1", "Q4_K", "Q6_K", "IQ2_XS", "int4 g128 zero points", "E4M3 per row", "NVFP4"]
)
def test_many_rows_are_packed_as_few_are(name: str) -> None:
    weight = random_weight(2100, 256, seed=6)  # more than are packed at a time
    own = FITTED[name].encode(weight)
    again = FITTED[name].fit(weight, own).pack(own.dequantize().t().contiguous())
    assert torch.equal(again.dequantize(), own.dequantize())


@given(
    name=st.sampled_from(list(FITTED)),
    kind=st.sampled_from(WEIGHTS),
    exponent=st.integers(-3, 3),
    seed=st.integers(0, 10**6),
)
def test_hard_weights_are_packed_to_what_they_were(name: str, kind: str, exponent: int, seed: int) -> None:
    if name == "NVFP4 shared":
        exponent = 0  # a scale that is given suits weights of one size
    weight = weight_of_kind(kind, 3, COLUMNS, seed) * 10.0**exponent
    own = FITTED[name].encode(weight)
    again = FITTED[name].fit(weight, own).pack(own.dequantize().t().contiguous())
    assert bool(torch.isfinite(own.dequantize()).all())
    assert torch.equal(again.dequantize(), own.dequantize())
    assert own.shape == (3, COLUMNS)


@pytest.mark.parametrize("name", FITTED)
def test_what_is_packed_decodes_to_the_values_that_were_chosen(name: str) -> None:
    """To the bit: values are made by the very float32 operations that decoders do."""
    weight = random_weight(7, COLUMNS, seed=2)
    fit = FITTED[name].fit(weight, FITTED[name].encode(weight))
    values = fit.round_(alone(0, 1.5 * random_weight(7, COLUMNS, seed=3).t()))
    packed = fit.pack(values)
    decoded = packed.dequantize()
    if isinstance(packed, BlockTensor):
        decoded = torch.from_numpy(np.ascontiguousarray(dequantize(packed.data.numpy(), packed.type.value)))
    assert torch.equal(decoded, values.t())


@pytest.mark.parametrize("name", STEPS)
def test_a_column_takes_the_nearest_of_all_values(name: str) -> None:
    # The same row many times, so that each has the same values to choose from, for a target of its own.
    row = random_weight(1, 256, seed=4)
    weight = row.expand(3000, 256).contiguous()
    fit = FITTED[name].fit(weight, FITTED[name].encode(weight))
    even, falling = torch.linspace(-1.0, 1.0, 2000), torch.logspace(-7.0, 0.0, 500)
    for column in (0, 77, 255):
        group = row[:, column // 128 * 128 :][:, :128]
        targets = 2.0 * float(group.abs().max()) * torch.cat([even, falling, -falling])
        values = fit.round_(alone(column, targets.unsqueeze(0)))[0]
        levels = torch.tensor(sorted(set(values.tolist())))
        assert len(levels) == LEVELS[name]
        nearest = (targets.unsqueeze(1) - levels).abs().amin(1)
        # Targets are multiplied by the inverse of a scale, so they may be off by a rounding or two.
        assert bool(((targets - values).abs() <= nearest + 1e-6 * targets.abs()).all())


@pytest.mark.parametrize("name", FITTED)
def test_rows_can_be_exchanged(name: str) -> None:
    weight = random_weight(6, COLUMNS, seed=5)
    own = FITTED[name].encode(weight)
    fit = FITTED[name].fit(weight, own)
    other = fit.pack(fit.round_(alone(0, 0.5 * weight.t())))
    chosen = torch.tensor([True, False, False, True, True, False])
    mixed = own.with_rows(chosen, other).dequantize()
    assert torch.equal(mixed[chosen], other.dequantize()[chosen])
    assert torch.equal(mixed[~chosen], own.dequantize()[~chosen])


def test_plain_floats_have_nothing_to_fit() -> None:
    grid, weight = BlockGrid(GgmlType.BF16), torch.zeros(2, 32)
    assert not grid.has_codes
    with pytest.raises(UsageError, match="BF16 has no scales to fit"):
        grid.fit(weight, grid.encode(weight))
