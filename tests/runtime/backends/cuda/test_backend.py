"""What the CUDA backend launches, with which arguments, and what it leaves to torch; no launch is carried out."""

from __future__ import annotations

import struct
import warnings
from dataclasses import dataclass, field, replace

import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor
from torch.nn import functional

from qconv.core.qtensor import Grid, QTensor
from qconv.errors import BackendError
from qconv.formats import get_format
from qconv.runtime.backends.cuda.backend import CudaBackend
from qconv.runtime.backends.cuda.compiler import Source
from qconv.runtime.backends.cuda.launch import Launch
from qconv.runtime.backends.cuda.operators import CudaExperts, CudaLinear
from qconv.runtime.backends.cuda.products import row_tile, slices_of
from qconv.runtime.backends.cuda.weights import aligned, beside, pack, stacked, tensors
from qconv.runtime.backends.reference import ReferenceExperts, ReferenceLinear
from qconv.runtime.packed import BlockWeight, DenseWeight, FloatWeight, IntegerWeight, PackedMlp, PackedWeight
from tests.conftest import random_float_qtensor, random_qtensor

CPU = torch.device("cpu")


@dataclass
class Recorder:
    """Writes launches down; outputs keep what was in their memory."""

    multiprocessors: int = 132
    broken: bool = False
    loaded: list[str] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)

    def load(self, source: Source) -> None:
        if self.broken:
            raise BackendError(f"{source.name} does not compile")
        self.loaded.append(source.name)

    def launch(self, launch: Launch) -> None:
        self.launches.append(launch)


def integer(
    output_format: str,
    columns: int = 64,
    depth: int = 128,
    group_size: int = 32,
    *,
    bits: int = 4,
    act_order: bool = False,
) -> IntegerWeight:
    """A weight as its file holds it."""
    symmetric = output_format == "w4a16"
    grid = Grid(bits, group_size, symmetric, torch.float16, act_order=act_order)
    weight = random_qtensor(grid, columns, depth, seed=columns + depth)
    if act_order:
        order = torch.randperm(depth, generator=torch.Generator().manual_seed(1))
        weight = replace(weight, group_index=(torch.arange(depth) // group_size)[order].to(torch.int32))
    parts = dict(get_format(output_format).pack("x", weight))
    return IntegerWeight(
        "x", (columns, depth), output_format, grid, {k.removeprefix("x."): v for k, v in parts.items()}
    )


def fp8(columns: int = 64, depth: int = 128) -> FloatWeight:
    grid = Grid(8, 128, True, torch.float32, "e4m3", 128)
    return FloatWeight("x", random_float_qtensor(grid, columns, depth, 0))


def blocks(kind: GGMLQuantizationType, row: int, columns: int = 64, depth: int = 256) -> BlockWeight:
    return BlockWeight("x", (columns, depth), kind, torch.zeros(columns, row, dtype=torch.uint8))


WEIGHTS: dict[str, tuple[PackedWeight, str]] = {
    "awq": (integer("awq"), "awq"),
    "gptq": (integer("gptq"), "int4"),
    "act-order": (integer("gptq", act_order=True), "int4"),
    "w4a16": (integer("w4a16"), "int4"),
    "fp8": (fp8(), "fp8"),
    "Q8_0": (blocks(GGMLQuantizationType.Q8_0, 8 * 34), "q8_0"),
    "Q4_K": (blocks(GGMLQuantizationType.Q4_K, 144), "q4_k"),
    "Q6_K": (blocks(GGMLQuantizationType.Q6_K, 210), "q6_k"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_format_has_its_kernels(name: str) -> None:
    weight, layout = WEIGHTS[name]
    recorder = Recorder()
    operator = CudaBackend(CPU, recorder).linear(weight)
    assert isinstance(operator, CudaLinear)
    assert recorder.loaded == [f"{layout}.cu"]
    columns, depth = weight.shape
    output = operator(torch.zeros(2, 3, depth, dtype=torch.bfloat16))
    assert output.shape == (2, 3, columns)
    assert output.dtype == torch.bfloat16
    product = next(launch for launch in recorder.launches if launch.kernel == f"qconv_{layout}_m8_bf16")
    assert product.grid[:2] == (1, 1)
    # Packed weights stay near their size in the file: no layout stores more than 5 % beside it.
    in_file = sum(tensor.nbytes for tensor in weight.tensors())
    kept = sum(tensor.nbytes for tensor in operator.tensors())
    assert kept <= 1.05 * in_file + columns * 4 * (depth // 32)


@pytest.mark.parametrize(("rows", "tile"), [(1, 8), (8, 8), (9, 16), (17, 32), (33, 64), (500, 64)])
def test_the_tile_suits_the_rows(rows: int, tile: int) -> None:
    assert row_tile(rows) == tile
    recorder = Recorder(multiprocessors=1)
    operator = CudaBackend(CPU, recorder).linear(WEIGHTS["awq"][0])
    operator(torch.zeros(rows, 128, dtype=torch.float16))
    (launch,) = recorder.launches
    assert launch.kernel == f"qconv_awq_m{tile}_f16"
    assert launch.grid == (1, -(-rows // tile), 1)


@pytest.mark.parametrize(
    ("columns", "depth", "tiles", "tile", "slices"),
    [
        (6144, 2560, 1, 16, 5),  # 48 blocks: five slices of eight tiles each
        (12288, 6144, 1, 16, 2),
        (12288, 6144, 1, 8, 5),  # blocks of half as many threads
        (5120, 6144, 89, 16, 1),  # enough blocks
        (128, 512, 1, 8, 1),  # too short to split
        (128, 65536, 1, 8, 16),  # no more than sixteen
    ],
)
def test_k_is_split_where_that_fills_the_device(columns: int, depth: int, tiles: int, tile: int, slices: int) -> None:
    assert slices_of(columns, depth, tiles, tile, 132) == slices


def test_a_split_product_ends_in_the_sum_of_its_slices() -> None:
    recorder = Recorder()
    weight = integer("awq", 32, 2048)
    output = CudaBackend(CPU, recorder).linear(weight)(torch.zeros(3, 2048, dtype=torch.float16))
    product, total = recorder.launches
    assert product.grid == (1, 1, 4)
    assert product.output.shape == (4, 3, 32)
    assert product.output.dtype == torch.float32
    assert total.kernel == "qconv_sum_slices_f16"
    assert total.output.data_ptr() == output.data_ptr()
    assert struct.unpack("<QQQi4x", total.arguments) == (product.output.data_ptr(), output.data_ptr(), 96, 4)


def test_arguments_are_laid_out_as_the_kernel_reads_them() -> None:
    recorder = Recorder(multiprocessors=1)
    operator = CudaBackend(CPU, recorder).linear(WEIGHTS["awq"][0])
    assert isinstance(operator, CudaLinear)
    inputs = torch.zeros(5, 128, dtype=torch.float16)
    output = operator(inputs)
    weight = operator.weight
    assert weight.offsets is not None
    (launch,) = recorder.launches
    assert launch.threads == 64
    assert struct.unpack("<8Q7i4x", launch.arguments) == (
        inputs.data_ptr(), weight.weights.data_ptr(), 0, weight.scales.data_ptr(), weight.offsets.data_ptr(),
        output.data_ptr(), 0, 0,
        5, 64, 128, 1, 5, 0, 0,
    )  # fmt: skip
    assert all(tensor.data_ptr() % 16 == 0 for tensor in launch.inputs.values())


def test_more_rows_than_a_grid_has_blocks() -> None:
    recorder = Recorder(multiprocessors=1)
    operator = CudaBackend(CPU, recorder).linear(integer("gptq", act_order=True))
    operator(torch.zeros(70000, 128, dtype=torch.float16))
    gather, product = recorder.launches
    assert gather.grid == (1, 35000, 1)
    assert struct.unpack("<4i", gather.arguments[40:]) == (70000, 128, 1, 2)
    assert product.grid == (1, 1094, 1)


def mlp(seed: int) -> PackedMlp:
    gate, up, down = (integer("gptq", *shape) for shape in ((96, 128), (96, 128), (128, 96)))
    return PackedMlp(gate, up, down)


def test_experts_take_two_products_for_all_of_them() -> None:
    recorder = Recorder(multiprocessors=1)
    operator = CudaBackend(CPU, recorder).experts([mlp(seed) for seed in range(4)], functional.silu)
    assert isinstance(operator, CudaExperts)
    chosen = torch.tensor([[0, 2], [2, 3], [2, 0]])
    output = operator(torch.zeros(3, 128, dtype=torch.bfloat16), chosen, torch.rand(3, 2))
    assert output.shape == (3, 128)
    inner, down = recorder.launches
    assert inner.output.shape == (6, 192)  # gate and up side by side
    assert down.output.shape == (6, 128)
    assert struct.unpack("<7i4x", inner.arguments[64:]) == (6, 192, 128, 2, 5, 0, 0)
    assert struct.unpack("<7i4x", down.arguments[64:]) == (6, 128, 96, 1, 5, 0, 0)
    assert torch.equal(inner.inputs["row_ids"], down.inputs["row_ids"])
    assert inner.inputs["weights"].shape == (4, 16, 24, 8)


def test_gate_and_up_with_orders_of_their_own_stay_apart() -> None:
    gate, up = (pack(integer("gptq", act_order=True)) for _ in range(2))
    assert beside(gate, up) is not None  # the same order
    assert up.gather is not None
    assert beside(gate, replace(up, gather=up.gather.flip(0))) is None
    assert beside(gate, pack(integer("gptq"))) is None
    assert beside(gate, replace(up, zero_offset=1)) is None


def test_weights_beside_each_other_are_those_weights() -> None:
    for name in ("awq", "gptq", "fp8", "Q8_0", "Q4_K", "Q6_K"):
        first = pack(WEIGHTS[name][0])
        second = replace(first, weights=first.weights + 1, scales=first.scales.flip(0))
        both = beside(first, second)
        assert both is not None
        assert both.columns == 2 * first.columns
        for key, value in tensors(first).items():
            half = value.shape[1]
            assert torch.equal(tensors(both)[key][:, :half], value), (name, key)
            assert torch.equal(tensors(both)[key][:, half:], tensors(second)[key]), (name, key)


def test_experts_that_differ_do_not_stack() -> None:
    with pytest.raises(BackendError, match="packed in different ways"):
        stacked([pack(integer("gptq")), pack(integer("awq"))])


def test_memory_that_kernels_cannot_read_is_copied() -> None:
    whole = torch.arange(40, dtype=torch.float16)
    assert aligned(whole) is whole
    for view in (whole[1:33], whole.view(5, 8).t()):
        copy = aligned(view)
        assert copy.data_ptr() % 16 == 0
        assert copy.is_contiguous()
        assert torch.equal(copy, view)


NO_KERNEL: dict[str, PackedWeight] = {
    "multiples of 32": integer("gptq", columns=40),
    "8-bit integers": integer("w4a16", bits=8),
    "groups of 16": integer("gptq", group_size=16),
    "ggml's IQ4_NL": blocks(GGMLQuantizationType.IQ4_NL, 8 * 18),
}


@pytest.mark.parametrize("reason", NO_KERNEL)
def test_what_no_kernel_takes_goes_to_torch_with_one_warning(reason: str) -> None:
    backend = CudaBackend(CPU, Recorder())
    weight = NO_KERNEL[reason]
    with pytest.warns(UserWarning, match=reason):
        operator = backend.linear(weight)
    assert isinstance(operator, ReferenceLinear)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.linear(weight)  # told once
    with warnings.catch_warnings(record=True):
        assert isinstance(backend.experts([PackedMlp(weight, weight, weight)], functional.silu), ReferenceExperts)


def test_dense_weights_go_to_torch_without_a_word() -> None:
    backend = CudaBackend(CPU, Recorder())
    weight = DenseWeight("x", torch.rand(8, 16))
    assert isinstance(backend.linear(weight), ReferenceLinear)
    assert isinstance(backend.experts([PackedMlp(weight, weight, weight)], functional.silu), ReferenceExperts)


def test_kernels_that_do_not_compile_are_told_and_replaced() -> None:
    backend = CudaBackend(CPU, Recorder(broken=True))
    with pytest.warns(UserWarning, match=r"awq\.cu does not compile; torch's own operations are used"):
        assert isinstance(backend.linear(WEIGHTS["awq"][0]), ReferenceLinear)


def test_float32_is_torchs_work() -> None:
    recorder = Recorder()
    weight = WEIGHTS["gptq"][0]
    operator = CudaBackend(CPU, recorder).linear(weight)
    inputs = torch.rand(3, 128)
    assert torch.equal(operator(inputs), functional.linear(inputs, weight.dequantize(torch.float32)))
    experts = CudaBackend(CPU, recorder).experts([mlp(0), mlp(1)], functional.silu)
    answer = experts(inputs, torch.tensor([[0], [1], [0]]), torch.ones(3, 1))
    assert answer.dtype == torch.float32
    assert not recorder.launches


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_no_tokens(dtype: torch.dtype) -> None:
    recorder = Recorder()
    backend = CudaBackend(CPU, recorder)
    none: Tensor = torch.zeros(0, 128, dtype=dtype)
    assert backend.linear(WEIGHTS["awq"][0])(none).shape == (0, 64)
    experts = backend.experts([mlp(0), mlp(1)], functional.silu)
    assert experts(none, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)).shape == (0, 128)
    assert not recorder.launches


def test_a_zero_point_of_sixteen() -> None:
    grid = Grid(4, 32, False, torch.float16)
    weight = random_qtensor(grid, 32, 64, 0)
    assert weight.zero_points is not None
    high = QTensor(grid, weight.codes, weight.scales, weight.zero_points.clamp(min=1).fill_(16))
    from qconv.runtime.repack import int4_weight

    packed = int4_weight(high)
    assert packed.zero_offset == 1
    assert packed.offsets is not None
    assert bool((packed.offsets == -1).all())  # fifteen in every nibble
