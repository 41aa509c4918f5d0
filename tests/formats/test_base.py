"""Conversion a few rows at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qconv.formats import base
from qconv.formats.base import by_rows


@given(st.integers(0, 9), st.integers(1, 5), st.booleans(), st.booleans())
def test_parts_make_the_whole(eights: int, columns: int, wide: bool, transposed: bool) -> None:
    values = torch.arange(8 * eights * columns).view(8 * eights, columns)
    given_values = values.t().contiguous().t() if wide else values
    sizes = []

    def eight_in_one(block: Tensor) -> Tensor:
        sizes.append(len(block))
        return block.reshape(-1, 8, columns).sum(1)

    def two_of_one(block: Tensor) -> Tensor:
        return torch.stack([block, -block], 1).view(2 * len(block), columns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "_BLOCK_ELEMENTS", 1)
        for convert in (eight_in_one, two_of_one):
            expected = convert(values)
            sizes.clear()
            found = by_rows(convert, given_values, transposed=transposed)
            assert found.is_contiguous()
            assert torch.equal(found, expected.t() if transposed else expected)
    assert sizes == [] or max(sizes) <= 32


def test_intermediate_values_are_those_of_a_few_rows() -> None:
    sizes = []

    def convert(block: Tensor) -> Tensor:
        sizes.append(block.numel())
        return block

    by_rows(convert, torch.zeros(5000, 1000, dtype=torch.uint8))
    assert max(sizes) <= 1 << 20
    assert sum(sizes) == 5_000_000
