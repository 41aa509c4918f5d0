"""The reference backend against float64, and what decides which backend runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qconv.core.qtensor import CHANNEL, Grid
from qconv.errors import UsageError
from qconv.formats import get_format
from qconv.runtime.backends import get_backend
from qconv.runtime.backends.reference import ReferenceBackend
from qconv.runtime.packed import DenseWeight, FloatWeight, IntegerWeight, PackedMlp, PackedWeight
from tests.conftest import random_float_qtensor, random_qtensor

OUT, IN = 64, 96


def integer_weight(layout: str, grid: Grid, out_features: int = OUT, in_features: int = IN) -> IntegerWeight:
    """A random weight as the file of a format holds it."""
    weight = random_qtensor(grid, out_features, in_features, seed=out_features)
    parts = {name.rpartition(".")[2]: part for name, part in get_format(layout).pack("w", weight)}
    return IntegerWeight("w", (out_features, in_features), layout, grid, parts)


WEIGHTS: dict[str, Callable[[], PackedWeight]] = {
    "dense": lambda: DenseWeight("w", torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))),
    "awq": lambda: integer_weight("awq", Grid(4, 32, False, torch.float16)),
    "gptq": lambda: integer_weight("gptq", Grid(4, 32, True, torch.float16)),
    "w4a16": lambda: integer_weight("w4a16", Grid(8, 32, False, torch.bfloat16)),
    "fp8": lambda: FloatWeight("w", random_float_qtensor(Grid(8, 40, True, torch.float32, "e4m3", 40), OUT, IN, 3)),
    "fp8-row": lambda: FloatWeight(
        "w", random_float_qtensor(Grid(8, CHANNEL, True, torch.float32, "e4m3"), OUT, IN, 4)
    ),
}


def exact(weight: PackedWeight, inputs: Tensor) -> Tensor:
    """The product in float64."""
    return inputs.double() @ weight.dequantize(torch.float32).double().t()


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_linear_is_the_product_with_the_weight_that_the_codes_stand_for(kind: str) -> None:
    weight = WEIGHTS[kind]()
    inputs = torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(1))
    got = ReferenceBackend(torch.device("cpu")).linear(weight)(inputs)
    wanted = exact(weight, inputs)
    assert got.dtype == torch.float32
    # Sums of 96 products in float32.
    assert float((got - wanted).norm() / wanted.norm()) < 1e-6


def test_experts_are_weighted_sums_of_the_chosen_ones_and_no_other_is_touched() -> None:
    generator = torch.Generator().manual_seed(2)
    mlps = [
        PackedMlp(*(DenseWeight("w", torch.randn(shape, generator=generator)) for shape in ((8, 16), (8, 16), (16, 8))))
        for _ in range(4)
    ]
    poisoned = PackedMlp(*(DenseWeight("w", torch.full(w.shape, torch.nan)) for w in mlps[2].weights()))
    inputs = torch.randn(5, 16, generator=generator)
    chosen = torch.tensor([[0, 1], [3, 0], [1, 3], [0, 3], [1, 0]])
    weights = torch.rand(5, 2, generator=generator)
    operator = ReferenceBackend(torch.device("cpu")).experts([*mlps[:2], poisoned, mlps[3]], torch.nn.functional.silu)
    got = operator(inputs, chosen, weights)
    for token in range(5):
        wanted = torch.zeros(16, dtype=torch.float64)
        for slot in range(2):
            gate, up, down = (w.dequantize(torch.float32).double() for w in mlps[chosen[token, slot]].weights())
            x = inputs[token].double()
            wanted += weights[token, slot].double() * (down @ (torch.nn.functional.silu(gate @ x) * (up @ x)))
        torch.testing.assert_close(got[token].double(), wanted, rtol=1e-5, atol=1e-5)


def test_what_a_backend_is_called_and_where_it_runs() -> None:
    assert get_backend("cpu").name == "cpu"
    assert get_backend("reference", "cpu").device == torch.device("cpu")
    with pytest.raises(UsageError, match="no 'tpu'"):
        get_backend("tpu")
    with pytest.raises(UsageError, match="does not run on device 'cpu'"):
        get_backend("cuda", "cpu")
    with pytest.raises(UsageError, match="no 'fridge'"):
        get_backend("auto", "fridge")


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, qconv; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
