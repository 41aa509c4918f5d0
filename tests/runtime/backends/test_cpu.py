"""The cpu backend's C++ against float64 and, bit for bit, against the reference's dequantized weights."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from qconv import native
from qconv.core.qtensor import CHANNEL, Grid
from qconv.errors import CheckpointError
from qconv.formats import get_format
from qconv.formats.gptq import ForeignGrid
from qconv.grids.ggml import GgmlType, encode
from qconv.runtime.backends import get_backend
from qconv.runtime.backends.compiled import Compiled, CompiledWeight, describe
from qconv.runtime.backends.cpu import CpuBackend, CpuExperts, CpuLinear, by_tiles
from qconv.runtime.backends.reference import ReferenceBackend, ReferenceLinear
from qconv.runtime.packed import BlockWeight, DenseWeight, FloatWeight, IntegerWeight, PackedMlp, PackedWeight
from tests.conftest import random_float_qtensor, random_qtensor

F16, BF16 = torch.float16, torch.bfloat16
Make = Callable[[int, int], PackedWeight]


def integer(layout: str, grid: Grid, group_index: Tensor | None = None) -> Make:
    """Random codes as the file of a format holds them."""

    def make(rows: int, columns: int) -> PackedWeight:
        weight = random_qtensor(grid, rows, columns, seed=rows)
        parts = {name.rpartition(".")[2]: part for name, part in get_format(layout).pack("w", weight)}
        if grid.act_order:
            order = torch.randperm(columns, generator=torch.Generator().manual_seed(1))
            parts["g_idx"] = (order // grid.group_size).to(torch.int32)
        if isinstance(grid, ForeignGrid):  # zero points as they are, and not less one
            parts["qzeros"] = torch.full_like(parts["qzeros"], 0x88888888 - 2**32)
        return IntegerWeight("w", (rows, columns), layout, grid, parts)

    return make


def floating(grid: Grid) -> Make:
    """Every finite E4M3 number."""
    return lambda rows, columns: FloatWeight("w", random_float_qtensor(grid, rows, columns, seed=3))


def blocks(type: GGMLQuantizationType) -> Make:
    """Normal weights, encoded."""

    def make(rows: int, columns: int) -> PackedWeight:
        values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(4))
        return BlockWeight("w", (rows, columns), type, encode(values, GgmlType(type)))

    return make


WEIGHTS: dict[str, Make] = {
    "awq": integer("awq", Grid(4, 32, False, F16)),
    "awq-128": integer("awq", Grid(4, 128, False, F16)),
    "awq-bf16-scales": integer("awq", Grid(4, 64, False, BF16)),
    "gptq": integer("gptq", Grid(4, 32, True, F16)),
    "gptq-v2-symmetric": integer("gptq", ForeignGrid(4, 64, True, F16)),
    "gptq-asymmetric": integer("gptq", Grid(4, 64, False, F16)),
    "gptq-act-order": integer("gptq", Grid(4, 32, True, F16, act_order=True)),
    "gptq-act-order-asymmetric": integer("gptq", Grid(8, 32, False, F16, act_order=True)),
    "gptq-channel": integer("gptq", Grid(4, CHANNEL, True, F16)),
    "gptq-8": integer("gptq", Grid(8, 32, True, F16)),
    "gptq-2": integer("gptq", Grid(2, 32, False, F16)),
    "w4a16": integer("w4a16", Grid(4, 128, True, BF16)),
    "w4a16-32": integer("w4a16", Grid(4, 32, True, BF16)),
    "w4a16-64-asymmetric": integer("w4a16", Grid(4, 64, False, F16)),
    "w4a16-channel": integer("w4a16", Grid(4, CHANNEL, False, torch.float32)),
    "w4a16-8": integer("w4a16", Grid(8, 32, False, BF16)),
    "fp8": floating(Grid(8, 128, True, torch.float32, "e4m3", 128)),
    "fp8-small-blocks": floating(Grid(8, 40, True, BF16, "e4m3", 24)),
    "fp8-row": floating(Grid(8, CHANNEL, True, BF16, "e4m3")),
    "fp8-tensor": floating(Grid(8, CHANNEL, True, F16, "e4m3", CHANNEL)),
    **{f"gguf-{name}": blocks(GGMLQuantizationType[name]) for name in ("Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K")},
}
ROUNDING = {torch.float32: 0.0, BF16: 2.0**-8, F16: 2.0**-11}
"""Half a unit in the last place of the outputs."""


@pytest.fixture(scope="module")
def library() -> Compiled:
    """The C++; these tests are about nothing else."""
    loaded = Compiled.load()
    if loaded is None:
        pytest.skip("no C++ compiler")
    return loaded


def described(weight: PackedWeight) -> CompiledWeight:
    """The weight as the library takes it."""
    found = describe(weight)
    assert found is not None
    return found


@pytest.mark.parametrize("kind", WEIGHTS)
def test_dense_weights_are_the_references_to_the_bit(library: Compiled, kind: str) -> None:
    for rows, columns in ((8 if "asym" not in kind else 16, 256), (72, 256), (136, 768)):
        if kind == "gptq-2":
            rows = -(-rows // 16) * 16
        weight = WEIGHTS[kind](rows, columns)
        for dtype in (torch.float32, BF16):
            assert torch.equal(library.dequantize([described(weight)], dtype), weight.dequantize(dtype))


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_products_against_float64(library: Compiled, kind: str, dtype: torch.dtype) -> None:
    backend = CpuBackend(library, torch.device("cpu"))
    for rows, columns in ((80, 256), (272, 768)):
        weight = WEIGHTS[kind](rows, columns)
        operator = backend.linear(weight)
        assert isinstance(operator, CpuLinear)
        for tokens in (1, 3, 9):  # the packed product, and the one with the weight in the inputs' dtype
            inputs = torch.randn(1, tokens, columns, generator=torch.Generator().manual_seed(tokens))
            inputs = (0.1 * inputs).to(dtype)
            rounded = tokens == 9 or by_tiles(operator.tiles_from, tokens, dtype)
            dense = weight.dequantize(dtype if rounded else torch.float32).double()
            wanted = inputs.double() @ dense.t()
            got = operator(inputs)
            assert (got.dtype, got.shape) == (dtype, (1, tokens, rows))
            # Sums of up to 768 products in float32, whose error does not come near that of one rounding.
            scale = inputs.double().abs() @ dense.abs().t()
            error = (got.double() - wanted).abs() - ROUNDING[dtype] * wanted.abs()
            assert float((error / scale).max()) < 1e-6


@pytest.mark.parametrize("kind", ["awq", "gptq-act-order", "w4a16-64-asymmetric", "fp8", "gguf-Q4_K"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_experts_against_float64(library: Compiled, kind: str, dtype: torch.dtype) -> None:
    hidden, width, count = 256, 512, 5
    make = WEIGHTS[kind]
    mlps = [PackedMlp(make(width, hidden), make(width, hidden), make(hidden, width)) for _ in range(count)]
    operator = CpuBackend(library, torch.device("cpu")).experts(mlps, torch.nn.SiLU())
    assert isinstance(operator, CpuExperts)
    assert operator.fused is not None
    generator = torch.Generator().manual_seed(5)
    for tokens in (1, 3, 40):
        inputs = (torch.randn(tokens, hidden, generator=generator) * 1e-3).to(dtype)
        chosen = torch.stack([torch.randperm(count - 1, generator=generator)[:2] for _ in range(tokens)])
        weights = torch.rand(tokens, 2, generator=generator)
        wanted = torch.zeros(tokens, hidden, dtype=torch.float64)
        for token in range(tokens):
            for slot in range(2):
                gate, up, down = (w.dequantize(torch.float32).double() for w in mlps[chosen[token, slot]].weights())
                x = inputs[token].double()
                answer = down @ (torch.nn.functional.silu(gate @ x) * (up @ x))
                wanted[token] += weights[token, slot].double() * answer
        got = operator(inputs, chosen, weights).double()
        # bf16 rounds gate, up, their product and the outputs: each by up to 2^-8 of what it rounds.
        assert float((got - wanted).norm() / wanted.norm()) < (1e-5 if dtype == torch.float32 else 4 * 2.0**-8)


def test_what_has_no_code_is_left_to_torch(library: Compiled) -> None:
    backend = CpuBackend(library, torch.device("cpu"))
    assert isinstance(backend.linear(WEIGHTS["awq"](8, 32)), CpuLinear)
    for weight in (DenseWeight("w", torch.ones(8, 8)), integer("gptq", Grid(3, 32, True, F16))(32, 32)):
        assert isinstance(backend.linear(weight), ReferenceLinear)
    mixed = PackedMlp(WEIGHTS["awq"](32, 32), WEIGHTS["awq"](32, 32), DenseWeight("w", torch.ones(32, 32)))
    experts = backend.experts([mixed], torch.nn.SiLU())
    inputs, chosen, weights = torch.randn(3, 32), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    wanted = ReferenceBackend(torch.device("cpu")).experts([mixed], torch.nn.SiLU())(inputs, chosen, weights)
    torch.testing.assert_close(experts(inputs, chosen, weights), wanted, rtol=1e-4, atol=1e-4)


def test_another_activation_is_not_taken_for_silu(library: Compiled) -> None:
    mlp = PackedMlp(*(WEIGHTS["awq"](32, 32) for _ in range(3)))
    operator = CpuBackend(library, torch.device("cpu")).experts([mlp], torch.nn.GELU())
    assert isinstance(operator, CpuExperts)
    assert operator.fused is None


def test_groups_of_act_order_may_have_any_number_of_inputs(library: Compiled) -> None:
    weight = WEIGHTS["gptq-act-order"](24, 96)
    assert isinstance(weight, IntegerWeight)
    weight.parts["g_idx"].copy_(torch.tensor([0, 2, 0] + [2] * 93))  # of two, none and 94
    weight.parts["g_idx"][40] = 0
    inputs = torch.randn(1, 96, generator=torch.Generator().manual_seed(8)).bfloat16()
    got = library.product(described(weight), inputs).double()
    dense = weight.dequantize(torch.float32).double()
    size = inputs.double().abs() @ dense.abs().t()
    assert float(((got - inputs.double() @ dense.t()).abs() / size).max()) < 1e-6


def test_a_group_index_out_of_range_is_refused_before_it_is_followed(library: Compiled) -> None:
    weight = WEIGHTS["gptq-act-order"](16, 64)
    assert isinstance(weight, IntegerWeight)
    weight.parts["g_idx"][5] = 2
    with pytest.raises(CheckpointError, match="names group 2"):
        CpuBackend(library, torch.device("cpu")).linear(weight)


def test_two_threads_compute_what_one_does(library: Compiled) -> None:
    weight = described(WEIGHTS["awq"](1024, 768))
    inputs = torch.randn(2, 768).bfloat16()
    one = library.product(weight, inputs), library.dequantize([weight], BF16).clone()
    torch.set_num_threads(2)
    try:
        two = library.product(weight, inputs), library.dequantize([weight], BF16)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


def test_without_a_compiler_torch_does_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(native.SWITCH, "0")
    with caplog.at_level(logging.WARNING):
        assert isinstance(get_backend("cpu"), ReferenceBackend)
    assert not caplog.records
