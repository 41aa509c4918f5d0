"""What the compiler emitted for every kernel, interpreted: equal to the emulator, right against float64."""

from __future__ import annotations

import re
import shutil
from functools import cache

import pytest
import torch
from torch import Tensor

from kernels.proof.launcher import PtxLauncher
from qconv.runtime.backends.cuda.compiler import compile_source
from qconv.runtime.backends.cuda.products import HELPERS, Rows, multiply
from qconv.runtime.backends.cuda.routing import route
from qconv.runtime.backends.cuda.sources import source_of
from qconv.runtime.kernel_interface import ROW_TILES, TILE_BYTES
from tests.kernels.launchers import EmulatorLauncher
from tests.kernels.products import case, depth_of, int4

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++"),
]

ARCHITECTURES = (80, 100)
SAME = {89: 80, 90: 80, 120: 100}
"""Targets whose PTX is another's to the letter."""
COLUMNS = 160  # a whole block of columns and a part of one
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@cache
def compiled(architecture: int) -> PtxLauncher:
    """One launcher for all tests, since it keeps what it compiled."""
    return PtxLauncher(architecture)


def integers(rows: int, depth: int, dtype: torch.dtype) -> Tensor:
    """Activations of which every sum within a slab is exact in float32, so that its order does not matter."""
    return torch.randint(-8, 9, (rows, depth), generator=torch.Generator().manual_seed(rows)).to(dtype)


def both(architecture: int, multiprocessors: int) -> tuple[PtxLauncher, EmulatorLauncher]:
    """The interpreter and the emulator, for a device of that size."""
    interpreter = compiled(architecture)
    interpreter.multiprocessors = multiprocessors
    return interpreter, EmulatorLauncher(multiprocessors, check=False)


def depth(layout: str) -> int:
    """Inputs: five tiles of 64 and a half, or where super-blocks do not allow that, eight."""
    return 352 if depth_of(layout) == 32 else 512


def assert_right(outputs: list[Tensor], exact: Tensor, dtype: torch.dtype) -> None:
    """The same bits from both launchers, within one rounding of float64."""
    assert torch.equal(*outputs)
    assert float((outputs[0].double() - exact).norm() / exact.norm()) < ROUNDING[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*TILE_BYTES, HELPERS])
@pytest.mark.parametrize("architecture", SAME)
def test_other_targets_have_the_same_ptx(architecture: int, layout: str) -> None:
    texts = [compile_source(source_of(layout), each, "ptx").decode() for each in (architecture, SAME[architecture])]
    mine, other = (re.sub(r"\.target sm_\d+", "", text) for text in texts)
    assert mine == other


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("tile", ROW_TILES)
@pytest.mark.parametrize("layout", TILE_BYTES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_weight(architecture: int, layout: str, tile: int, dtype: torch.dtype) -> None:
    weight = case(layout, COLUMNS, depth(layout), 32)
    inputs = integers(tile - 1, depth(layout), dtype)
    rows = Rows(len(inputs), 1, tile)
    outputs = [multiply(launcher, weight.packed, inputs, rows) for launcher in both(architecture, 1)]
    assert_right(outputs, inputs.double() @ weight.exact[0].t(), dtype)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("layout", TILE_BYTES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_slices_of_a_long_weight(architecture: int, layout: str, dtype: torch.dtype) -> None:
    weight = case(layout, 32, 1024, 128)
    inputs = integers(3, 1024, dtype)
    launchers = both(architecture, 8)
    outputs = [multiply(launcher, weight.packed, inputs, Rows(3, 1, 8)) for launcher in launchers]
    assert [launch.grid[2] for launch in launchers[1].launches] == [2, 1]  # two slices, then their sum
    assert_right(outputs, inputs.double() @ weight.exact[0].t(), dtype)


@pytest.mark.parametrize("layout", TILE_BYTES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_experts(architecture: int, layout: str) -> None:
    # Expert 0 gets no token, expert 1 gets most.
    weight = case(layout, COLUMNS, depth(layout), 32, experts=4)
    chosen = torch.tensor([[1, 2], [1, 3], [1, 2], [3, 1], [1, 2], [1, 3], [2, 1], [1, 3], [1, 2]])
    inputs = integers(len(chosen), depth(layout), torch.float16)
    rows = route(chosen, 4)
    outputs = [multiply(launcher, weight.packed, inputs, rows) for launcher in both(architecture, 1)]
    exact = torch.stack(
        [inputs[r // 2].double() @ weight.exact[e].t() for r, e in enumerate(chosen.flatten().tolist())]
    )
    assert_right(outputs, exact, torch.float16)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_experts_with_orders_of_their_own(architecture: int) -> None:
    weight = int4(64, 128, 32, experts=3, act_order=True)
    gather = weight.packed.gather
    assert gather is not None
    chosen = torch.tensor([[1], [2], [1], [0], [2]])
    inputs = integers(len(chosen), 128, torch.bfloat16)
    rows = route(chosen, 3)
    outputs = [multiply(launcher, weight.packed, inputs, rows) for launcher in both(architecture, 1)]
    exact = torch.stack(
        [inputs[r, gather[e]].double() @ weight.exact[e].t() for r, e in enumerate(chosen.flatten().tolist())]
    )
    assert_right(outputs, exact, torch.bfloat16)
