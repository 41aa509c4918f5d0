"""The uneven values of IQ4_NL and IQ4_XS."""

from __future__ import annotations

import torch
from gguf.quants import IQ4_NL

from qconv.grids.ggml import codebook

VALUES = torch.tensor(IQ4_NL.kvalues, dtype=torch.float32)


def test_the_nearest_value_everywhere() -> None:
    # Eighths of a unit, beyond both ends; no boundary is an odd multiple of a sixteenth, so none is a tie.
    numbers = torch.arange(-3000, 3000) / 8.0 + 1.0 / 16.0
    expected = VALUES[(numbers.unsqueeze(1) - VALUES).abs().argmin(1)]
    assert torch.equal(codebook.nearest(numbers.clone()), expected)


def test_values_have_their_place_as_code() -> None:
    assert codebook.codes(VALUES.view(4, 4)).flatten().tolist() == list(range(16))
