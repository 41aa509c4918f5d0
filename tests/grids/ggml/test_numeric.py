"""Arithmetic that is the same on every processor."""

from __future__ import annotations

import numpy as np
import torch

from qconv.grids.ggml.numeric import square_root


def test_square_roots_are_correctly_rounded() -> None:
    values = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(-50, 50).repeat(1000)
    assert np.array_equal(square_root(values).numpy(), np.sqrt(values.numpy())), (
        "numpy's is the processor's instruction"
    )
