"""TQ1_0 and TQ2_0: the bytes of the gguf package's encoder, and what a search makes of importance."""

from __future__ import annotations

import pytest
import torch
from gguf.quants import quantize
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qconv.grids.ggml import GgmlType, encode, ternary
from qconv.grids.ggml.scaled import Encoded
from tests.grids.ggml.conftest import (
    NEARLY_EXACT,
    SPREAD,
    TERNARY,
    bell_weights,
    blocks_of_256,
    column_importance,
    decode,
    squared_error,
)

every_type = pytest.mark.parametrize("type", TERNARY, ids=lambda type: type.name)


@every_type
@pytest.mark.usefixtures("both_encoders")
def test_the_bytes_are_those_of_the_gguf_package(type: GgmlType) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(64, 256, generator=generator) * torch.exp(2.0 * torch.randn(64, 256, generator=generator))
    ties = torch.randint(-40, 41, (64, 256), generator=generator) / 80.0
    ties[:, 3] = 1.0  # codes at halves, away from zero
    for weight in (bell_weights(64, 512), wide, ties, torch.zeros(2, 256), torch.full((2, 256), -0.7)):
        assert torch.equal(encode(weight, type), torch.from_numpy(quantize(weight.numpy(), type.value)))


@every_type
@given(weight=blocks_of_256(SPREAD + NEARLY_EXACT, -2, 4))
def test_by_formula_every_weight_takes_the_nearest_of_three(type: GgmlType, weight: Tensor) -> None:
    largest = weight.abs().amax(1, keepdim=True)
    levels = torch.cat([-largest, torch.zeros_like(largest), largest], dim=1).double()
    nearest = (weight.double().unsqueeze(2) - levels.unsqueeze(1)).abs().amin(2)
    error = (decode(encode(weight, type), type).double() - weight.double()).abs()
    assert bool((error <= nearest + largest * 2.0**-11 * 1.01 + 2.0**-25).all())  # the scale becomes float16


@every_type
@given(seed=st.integers(0, 10**6), digits=st.sampled_from([2, 3]))
def test_packed_codes_decode_to_themselves(type: GgmlType, seed: int, digits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(digits - 3, 2, (256, 1, 8), generator=generator).float()
    scales = torch.randn(1, 8, generator=generator).half().float()
    packed = {"TQ1_0": ternary.pack_tq1_0, "TQ2_0": ternary.pack_tq2_0}[type.name](
        Encoded(values, scales, torch.ones(8))
    )
    assert packed.shape == (8, type.block_bytes)
    assert torch.equal(decode(packed, type), (values * scales).squeeze(1).t())
    assert bool((packed[:, -2:].contiguous().view(torch.float16) >= 0.0).all())


@every_type
@pytest.mark.usefixtures("both_encoders")
def test_importance_makes_the_magnitude_that_of_most_weights(type: GgmlType) -> None:
    weight, importance = bell_weights(64), column_importance(512)
    found = squared_error(weight, encode(weight, type, importance), type, importance)
    formula = squared_error(weight, encode(weight, type), type, importance)
    assert bool((found < formula).all())
    # Measured 0.2997, plus one percent: the search tries few magnitudes.
    assert float(found.sum() / formula.sum()) < 0.3027


@every_type
@pytest.mark.usefixtures("both_encoders")
def test_a_ternary_weight_is_exact(type: GgmlType) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-1, 2, (16, 512), generator=generator) * 0.03125
    for importance in (None, column_importance(512)):
        assert torch.equal(decode(encode(weight, type, importance), type), weight)
