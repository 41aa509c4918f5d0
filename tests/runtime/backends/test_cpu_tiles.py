"""Products of many rows: weights decoded into tiles, against the dense weights to the bit and against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qconv.core.qtensor import Grid, QTensor
from qconv.runtime.backends.compiled import Compiled, Units
from qconv.runtime.backends.cpu import FEW_TOKENS, CpuBackend, CpuExperts, by_tiles
from qconv.runtime.packed import BlockWeight, DenseWeight, FloatWeight, IntegerWeight, PackedMlp, PackedWeight
from tests.conftest import random_float_qtensor
from tests.runtime.backends.test_cpu import BF16, WEIGHTS, described, integer

ROWS = (1, 2, 15, 16, 17, 31, 33, 64, 129, 512)
KINDS = tuple(WEIGHTS)
ODD_SHAPES = {  # outputs and inputs that fill no tile, block of tiles, panel or chunk
    "awq": (40, 96),
    "awq-128": (136, 640),
    "gptq": (24, 96),
    "gptq-act-order": (56, 544),
    "gptq-act-order-asymmetric": (36, 96),
    "gptq-asymmetric": (40, 576),
    "gptq-channel": (8, 72),
    "gptq-8": (20, 608),
    "gptq-2": (48, 544),
    "w4a16": (33, 640),
    "w4a16-32": (161, 544),
    "w4a16-channel": (40, 520),
    "w4a16-8": (12, 96),
    "fp8": (130, 200),
    "fp8-small-blocks": (50, 1000),
    "fp8-row": (7, 39),
    "fp8-tensor": (65, 1056),
    "gguf-Q8_0": (35, 544),
    "gguf-Q4_0": (1, 32),
    "gguf-Q4_K": (31, 256),
    "gguf-Q5_K": (33, 768),
    "gguf-Q6_K": (129, 1280),
}


@pytest.fixture(scope="module")
def best() -> Compiled:
    """The library with the best of what this processor has."""
    loaded = Compiled.load()
    if loaded is None or loaded.units == Units.TORCH:
        pytest.skip("no C++ compiler, or no AVX-512 BF16")
    return loaded


@pytest.fixture(params=[Units.AVX512, Units.AMX], ids=lambda units: units.name)
def library(request: pytest.FixtureRequest, best: Compiled) -> Compiled:
    """The library as on a processor that has just these units."""
    if request.param > best.units:
        pytest.skip("the processor has no AMX")
    return replace(best, units=request.param)


def activations(*shape: int) -> Tensor:
    """Normal, bfloat16."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0])).bfloat16()


def check_product(library: Compiled, weight: PackedWeight, inputs: Tensor) -> None:
    """Sums in float32 of products that are exact there, rounded once."""
    got = library.tile_product(described(weight), inputs).double()
    dense = weight.dequantize(BF16).double()
    wanted, size = inputs.double() @ dense.t(), inputs.double().abs() @ dense.abs().t()
    assert float(((got - wanted).abs() - 2.0**-8 * wanted.abs()).div(size).max()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_decoded_weights_are_the_references_to_the_bit(library: Compiled, kind: str) -> None:
    # The identity's product is the weight itself: each sum has one term that is not zero.
    shapes = [(112, 768), ODD_SHAPES.get(kind, (16, 256))]
    for rows, columns in shapes:
        weight = WEIGHTS[kind](rows, columns)
        inputs = torch.eye(columns, dtype=BF16)
        assert torch.equal(library.tile_product(described(weight), inputs), weight.dequantize(BF16).t())


@pytest.mark.parametrize("kind", KINDS)
def test_products_of_every_number_of_rows(library: Compiled, kind: str) -> None:
    weight = WEIGHTS[kind](160, 768)
    inputs = activations(max(ROWS), 768)
    for rows in ROWS:
        check_product(library, weight, inputs[:rows])


@pytest.mark.parametrize("kind", ODD_SHAPES)
def test_products_of_shapes_that_fill_no_tile(library: Compiled, kind: str) -> None:
    weight = WEIGHTS[kind](*ODD_SHAPES[kind])
    for rows in (1, 19, 530):  # the last: more than meet a panel at once
        check_product(library, weight, activations(rows, ODD_SHAPES[kind][1]))


@pytest.mark.parametrize("scale", [2.0**-110, -(2.0**110), 0.0, -0.37])
def test_e4m3_scales_of_any_size_and_sign(library: Compiled, scale: float) -> None:
    grid = Grid(8, 32, True, torch.float32, "e4m3", 32)
    made = random_float_qtensor(grid, 32, 64, seed=3)
    made.scales[0, 1] = scale
    weight = FloatWeight("w", QTensor(grid, made.codes, made.scales, None))
    got = library.tile_product(described(weight), torch.eye(64, dtype=BF16)).t()
    assert torch.equal(got, weight.dequantize(BF16))


@pytest.mark.parametrize("kind", ["awq", "gptq-act-order", "w4a16", "fp8", "gguf-Q4_K"])
def test_lower_units_compute_what_the_best_ones_do(best: Compiled, kind: str) -> None:
    weight, inputs = WEIGHTS[kind](112, 768), activations(40, 768)
    outputs = [CpuBackend(replace(best, units=units), torch.device("cpu")).linear(weight)(inputs) for units in Units]
    size = inputs.double().abs() @ weight.dequantize(BF16).double().abs().t()
    for output in outputs:  # two roundings of sums whose order differs
        difference = (output.double() - outputs[0].double()).abs() - 2.0**-7 * outputs[0].double().abs()
        assert float(difference.div(size).max()) < 1e-6


def shifted(weight: PackedWeight, by: int) -> PackedWeight:
    """Another weight of the same kind: codes move along, scales stay."""
    match weight:
        case IntegerWeight():
            name = "weight_packed" if weight.format == "w4a16" else "qweight"
            return replace(weight, parts={**weight.parts, name: weight.parts[name].roll(by, 0)})
        case FloatWeight():
            codes = weight.weight.codes.view(torch.uint8).roll(by, 0).view(weight.weight.codes.dtype)
            return replace(weight, weight=replace(weight.weight, codes=codes))
        case BlockWeight():
            return replace(weight, rows=weight.rows.roll(by, 0))
        case DenseWeight():
            raise AssertionError("not packed")


def mlps(kinds: Sequence[str], count: int, hidden: int, width: int) -> list[PackedMlp]:
    """Experts of the kinds of gate, up and down, no two weights alike."""
    shapes = [(width, hidden), (width, hidden), (hidden, width)]
    makes = [WEIGHTS[kind](*shape) for kind, shape in zip(kinds, shapes, strict=True)]
    return [PackedMlp(*(shifted(weight, 3 * e + i) for i, weight in enumerate(makes))) for e in range(count)]


def wanted_answers(experts: Sequence[PackedMlp], inputs: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """In float64 but for the activations between the products, which are bfloat16."""
    total = torch.zeros(inputs.shape, dtype=torch.float64)
    for number, mlp in enumerate(experts):
        gate, up, down = (weight.dequantize(BF16).double() for weight in mlp.weights())
        tokens, slots = (chosen == number).nonzero(as_tuple=True)
        x = inputs[tokens].double()
        between = (functional.silu(x @ gate.t()) * (x @ up.t())).bfloat16().double()
        total.index_add_(0, tokens, weights[tokens, slots].double().unsqueeze(-1) * (between @ down.t()))
    return total


@pytest.mark.parametrize(
    "kinds",
    [
        ("awq", "awq-128", "awq"),
        ("gptq", "awq", "gptq-8"),
        ("gptq-act-order", "gptq-act-order", "gptq-act-order"),
        ("w4a16", "w4a16-32", "w4a16-32"),
        ("fp8", "fp8", "fp8-row"),
        ("gguf-Q4_K", "gguf-Q5_K", "gguf-Q6_K"),
        ("gguf-Q8_0", "gguf-Q8_0", "gguf-Q4_0"),
    ],
    ids="/".join,
)
@pytest.mark.parametrize("size", [(256, 512), (768, 256)], ids=str)
def test_experts_of_many_tokens(library: Compiled, kinds: Sequence[str], size: tuple[int, int]) -> None:
    hidden, width = size
    experts = mlps(kinds, 5, hidden, width)
    operator = CpuBackend(library, torch.device("cpu")).experts(experts, torch.nn.SiLU())
    generator = torch.Generator().manual_seed(6)
    for tokens in (5, 67):
        inputs = (torch.randn(tokens, hidden, generator=generator) * 0.02).bfloat16()
        # Expert 3 is not chosen, expert 0 by every token, expert 1 by one.
        chosen = torch.stack([torch.tensor([0, 2 + 2 * (token % 2)]) for token in range(tokens)])
        chosen[2, 1] = 1
        weights = torch.rand(tokens, 2, generator=generator)
        got = operator(inputs, chosen, weights).double()
        wanted = wanted_answers(experts, inputs, chosen, weights)
        # What is between may round the other way where float32 and float64 differ: by 2^-8, seldom.
        assert float((got - wanted).norm() / wanted.norm()) < 2.0**-8


def test_experts_whose_width_fills_no_tile(library: Compiled) -> None:
    for layout in ("awq", "w4a16"):
        make = integer(layout, Grid(4, 8, False, torch.float16))
        mlp = PackedMlp(make(40, 72), shifted(make(40, 72), 1), make(72, 40))
        inputs, chosen, weights = 0.1 * activations(21, 72), torch.zeros(21, 1, dtype=torch.int64), torch.ones(21, 1)
        operator = CpuBackend(library, torch.device("cpu")).experts([mlp], torch.nn.SiLU())
        wanted = wanted_answers([mlp], inputs, chosen, weights)
        assert float((operator(inputs, chosen, weights).double() - wanted).norm() / wanted.norm()) < 2.0**-8


def test_more_pairs_than_a_batch(library: Compiled) -> None:
    experts = mlps(("awq", "awq", "awq"), 3, 32, 32)
    inputs, generator = 0.1 * activations(2500, 32), torch.Generator().manual_seed(7)
    chosen = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(2500)])
    weights = torch.rand(2500, 2, generator=generator)
    operator = CpuBackend(library, torch.device("cpu")).experts(experts, torch.nn.SiLU())
    wanted = wanted_answers(experts, inputs, chosen, weights)
    assert float((operator(inputs, chosen, weights).double() - wanted).norm() / wanted.norm()) < 2.0**-8


@pytest.mark.parametrize("kind", ["awq", "fp8"])
def test_any_number_of_threads_computes_the_same_bits(library: Compiled, kind: str) -> None:
    weight, inputs = described(WEIGHTS[kind](544, 768)), activations(70, 768)
    experts = mlps([kind] * 3, 4, 768, 544)
    chosen = torch.stack([torch.arange(token, token + 3) % 4 for token in range(70)])
    operator = CpuBackend(library, torch.device("cpu")).experts(experts, torch.nn.SiLU())
    outputs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            outputs.append((library.tile_product(weight, inputs), operator(0.02 * inputs, chosen, torch.ones(70, 3))))
        finally:
            torch.set_num_threads(1)
    for product, answers in outputs[1:]:
        assert torch.equal(product, outputs[0][0])
        assert torch.equal(answers, outputs[0][1])


def test_which_weights_and_activations_are_multiplied_by_tiles(best: Compiled) -> None:
    tiles_from = {kind: best.tiles_from(described(WEIGHTS[kind](16, 256))) for kind in KINDS}
    # Those without a product of their own for few rows take tiles for any number.
    assert {kind for kind, least in tiles_from.items() if least == 1} >= {"gptq-8", "gptq-2", "w4a16-8"}
    assert tiles_from["awq"] == tiles_from["gptq-act-order"] == FEW_TOKENS + 1
    assert 0 not in tiles_from.values()
    odd = described(integer("awq", Grid(4, 5, False, torch.float16))(8, 15))
    assert best.tiles_from(odd) == 0
    assert replace(best, units=Units.TORCH).tiles_from(described(WEIGHTS["awq"](8, 32))) == 0
    assert by_tiles(5, 5, BF16)
    assert not by_tiles(5, 4, BF16)
    assert not by_tiles(0, 9, BF16)
    assert not by_tiles(5, 9, torch.float32)
    assert not by_tiles(5, 9, torch.float16)


def test_experts_of_which_some_lie_the_other_way_are_computed_one_by_one(best: Compiled) -> None:
    experts = mlps(("awq", "w4a16-32", "awq"), 3, 64, 64)
    operator = CpuBackend(best, torch.device("cpu")).experts(experts, torch.nn.SiLU())
    assert isinstance(operator, CpuExperts)
    assert operator.tiles_from == 0
    inputs, chosen, weights = 0.1 * activations(9, 64), torch.arange(9).unsqueeze(1) % 3, torch.ones(9, 1)
    wanted = wanted_answers(experts, inputs, chosen, weights)
    assert float((operator(inputs, chosen, weights).double() - wanted).norm() / wanted.norm()) < 4 * 2.0**-8


def test_the_shape_of_leading_dimensions_is_kept(library: Compiled) -> None:
    weight, inputs = WEIGHTS["w4a16"](48, 128), activations(2, 7, 128)
    operator = CpuBackend(library, torch.device("cpu")).linear(weight)
    got = operator(inputs.transpose(0, 1))
    assert got.shape == (7, 2, 48)
    assert torch.equal(got.transpose(0, 1), operator(inputs))
