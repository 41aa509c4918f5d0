"""The encoders and kernels used by many threads that are all the first to do so.

What is compiled, loaded or tabulated at first use is forgotten before each round. ``make sanitize`` runs this file
under the sanitizers of address, undefined behaviour and threads.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from qconv import native
from qconv.core import integer_grid
from qconv.core.once import MadeOnce
from qconv.core.qtensor import Grid
from qconv.executors.threads import single_threaded_operations
from qconv.formats import get_format
from qconv.grids.ggml import GgmlType, codebook, compiled, encode, lattice
from qconv.runtime.backends import get_backend
from qconv.runtime.packed import IntegerWeight, PackedMlp
from tests.compiled import require
from tests.conftest import random_qtensor
from tests.grids.ggml.conftest import bell_weights, column_importance

THREADS = 8
ROUNDS = 3
TABLES = (lattice.lattice, compiled.lattice_tables, codebook._values, codebook._nearest_table)
"""All that is made once a process."""


@pytest.fixture(autouse=True)
def switching_often() -> Iterator[None]:
    """Threads take turns every few instructions, and one operation of torch is one thread's work."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    with single_threaded_operations():
        yield
    sys.setswitchinterval(before)


def at_once(function: Callable[[int], Tensor]) -> list[Tensor]:
    """The function's results of all threads, which start it together, after everything was forgotten."""
    barrier = threading.Barrier(THREADS)

    def started(number: int) -> Tensor:
        barrier.wait()
        return function(number)

    for table in TABLES:
        table.clear()
    native._loaded.cache_clear()
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(started, range(THREADS)))


def test_everything_made_once_is_forgotten_here() -> None:
    found = {
        one for module in (lattice, compiled, codebook) for one in vars(module).values() if isinstance(one, MadeOnce)
    }
    assert found == set(TABLES)


def test_a_table_is_made_once_for_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    @MadeOnce
    def table(size: int) -> Tensor:
        made.append(size)
        threading.Event().wait(0.05)  # long enough for all others to ask
        return torch.empty(size)

    found = at_once(lambda number: table(3))
    assert made == [3]
    assert all(one is found[0] for one in found)
    table.clear()
    assert table(3) is not found[0]


@pytest.mark.parametrize("type", list(GgmlType), ids=lambda type: type.name)
def test_encoding(type: GgmlType) -> None:
    require(compiled.LIBRARY)
    weight, importance = bell_weights(2, 512), column_importance(512)
    expected = encode(weight, type, importance)
    for _ in range(ROUNDS):
        for found in at_once(lambda number: encode(weight, type, importance)):
            assert torch.equal(found, expected)


def test_rounding() -> None:
    require(integer_grid.LIBRARY)
    weight, grid = bell_weights(16, 256), Grid(4, 64, True, torch.float16)

    def rounded(number: int) -> Tensor:
        assert integer_grid.extremes(weight, 4) is not None
        codes = integer_grid.encode(weight, torch.full((16, 4), 0.1 + number), None, grid)
        assert codes is not None
        return codes

    for _ in range(ROUNDS):
        for number, found in enumerate(at_once(rounded)):
            assert torch.equal(found, rounded(number))


@pytest.mark.parametrize("rows", [1, 64])
def test_products_of_packed_weights(rows: int) -> None:
    require("runtime")
    grid = Grid(4, 32, False, torch.float16)

    def packed(rows: int, columns: int) -> IntegerWeight:
        parts = get_format("awq").pack("w", random_qtensor(grid, rows, columns, seed=rows))
        return IntegerWeight("w", (rows, columns), "awq", grid, {name.rpartition(".")[2]: part for name, part in parts})

    weight = packed(2048, 256)  # 2^19 weights are worth two threads
    mlps = [PackedMlp(packed(128, 256), packed(128, 256), packed(256, 128)) for _ in range(2)]
    inputs = torch.randn(rows, 256, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    chosen = (torch.arange(rows) % 2).unsqueeze(1)

    def multiplied(number: int) -> Tensor:
        torch.set_num_threads(2)  # of the products themselves
        backend = get_backend("cpu", torch.device("cpu"))
        product = backend.linear(weight)(inputs)
        return torch.cat([product, backend.experts(mlps, torch.nn.SiLU())(inputs, chosen, torch.ones(rows, 1))], 1)

    expected = multiplied(0)
    for _ in range(ROUNDS):
        for found in at_once(multiplied):
            assert torch.equal(found, expected)
