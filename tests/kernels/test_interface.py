"""The Python mirror of the kernels' interface against what the sources compile to."""

from __future__ import annotations

import ctypes

import pytest
import torch

from qconv.runtime.kernel_interface import (
    ACTIVATIONS,
    HELPER_THREADS,
    ROW_TILES,
    TILE_BYTES,
    GatherArgs,
    GemmArgs,
    SumSlicesArgs,
    entry_name,
    shared_bytes,
    threads,
)
from tests.kernels.emulator import emulator

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("layout", list(TILE_BYTES))
def test_products(layout: str) -> None:
    """Entry names, threads, shared memory and the size of the argument block; no entry is left out."""
    assert emulator(layout).kernels == {
        entry_name(layout, rows, dtype): [threads(rows), shared_bytes(layout, rows), ctypes.sizeof(GemmArgs)]
        for rows in ROW_TILES
        for dtype in ACTIVATIONS
    }


def test_helpers() -> None:
    """The same for the other kernels."""
    sizes = dict.fromkeys(("qconv_sum_slices_f16", "qconv_sum_slices_bf16"), ctypes.sizeof(SumSlicesArgs))
    sizes["qconv_gather_columns"] = ctypes.sizeof(GatherArgs)
    assert emulator("helpers").kernels == {name: [HELPER_THREADS, 0, size] for name, size in sizes.items()}


def test_unknown_dtype() -> None:
    """There are no kernels for float32 activations."""
    with pytest.raises(KeyError):
        entry_name("awq", 8, torch.float32)
