"""Every code under every kind of scale comes out of the kernels bit for bit as the formats' own code dequantizes it.

The activations are the unit matrix and the output is float32, so the output is the dequantized weight.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qconv.core.qtensor import CHANNEL, Grid, QTensor
from qconv.formats.awq import FORMAT as AWQ
from qconv.formats.base import Format
from qconv.formats.gptq import FORMAT as GPTQ
from qconv.formats.w4a16 import FORMAT as W4A16
from qconv.runtime import repack
from qconv.runtime.kernel_interface import KernelWeight
from tests.kernels.products import BLOCK_BYTES, FACTORS, REPACKS, Case, ggml_weights, random_codes, run_dense, stack

pytestmark = pytest.mark.kernels

COLUMNS, DEPTH = 128, 256
DTYPES = (torch.float16, torch.bfloat16)
HALVES = torch.tensor([0.0, -0.0, 2.0**-24, -(2.0**-24), 2.0**-14, 0.1, -0.1, 1.0, 3.14, 65504.0, -65504.0])
"""Edges of float16: zeros, subnormals, the smallest normal number, the largest."""


def dequantized(weight: KernelWeight, dtype: torch.dtype, row_tile: int) -> Tensor:
    """float32 [N, K], by a kernel; the last of its inputs are in a slice of their own."""
    ones = torch.eye(weight.depth, dtype=dtype)
    result = run_dense(Case(stack([weight]), torch.zeros(1, weight.columns, weight.depth).double()), ones, row_tile, 2)
    assert result.report.errors == ()
    return result.output.t()


def assert_same(weight: KernelWeight, expected: Tensor) -> None:
    """Equal as numbers: a sum that starts from zero cannot tell -0 from 0."""
    assert torch.isfinite(expected).all()
    for dtype in DTYPES:
        for row_tile in (8, 64):
            actual = dequantized(weight, dtype, row_tile)
            assert torch.equal(actual, expected), f"{dtype}, {row_tile} rows: {int((actual != expected).sum())} differ"


def integers(grid: Grid) -> QTensor:
    """All codes under all zero points, every edge scale beside ordinary ones."""
    groups = grid.groups(DEPTH)
    codes = torch.arange(COLUMNS * DEPTH).view(COLUMNS, DEPTH).add(torch.arange(COLUMNS)[:, None]) % 16
    count = COLUMNS * groups
    scales = torch.rand(count, generator=torch.Generator().manual_seed(0)) * 0.1
    edges = HALVES.repeat_interleave(min(16, count // len(HALVES)))
    scales[: len(edges)] = edges
    zero_points = torch.arange(count).view(COLUMNS, groups) % 16
    index = None
    if grid.act_order:
        index = torch.arange(DEPTH).div(grid.group_size, rounding_mode="floor").to(torch.int32)
        index = index[torch.from_numpy(np.random.default_rng(0).permutation(DEPTH))]
    return QTensor(
        grid,
        codes.to(torch.uint8),
        scales.view(COLUMNS, groups).to(grid.scale_dtype),
        None if grid.symmetric else zero_points.to(torch.uint8),
        index,
    )


def through_file(layout: Format, weight: QTensor) -> tuple[dict[str, Tensor], QTensor]:
    """The tensors of a file, and the weight read back from them."""
    tensors = dict(layout.pack("linear", weight))
    return tensors, layout.unpack("linear", weight.shape, tensors.__getitem__, weight.grid)


def test_awq() -> None:
    """The file's tensors as they are."""
    for group_size in (32, 128):
        tensors, weight = through_file(AWQ, integers(Grid(4, group_size, False, torch.float16)))
        words = (tensors[f"linear.{name}"] for name in ("qweight", "qzeros", "scales"))
        assert_same(repack.awq_weight(*words), weight.dequantize())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq(symmetric: bool, act_order: bool) -> None:
    """Both checkpoint formats; act-order inputs come out in the order of ``gather``."""
    _, weight = through_file(GPTQ, integers(Grid(4, 32, symmetric, torch.float16, act_order=act_order)))
    packed = repack.int4_weight(weight)
    expected = weight.dequantize()
    if packed.gather is not None:
        expected = expected[:, packed.gather]
    assert act_order == (packed.gather is not None)
    assert_same(packed, expected)


@pytest.mark.parametrize("group_size", [32, 128, CHANNEL])
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_compressed_tensors(scale_dtype: torch.dtype, group_size: int) -> None:
    """Scales in both 16-bit types, one a row among them."""
    for symmetric in (True, False):
        grid = Grid(4, group_size, symmetric, scale_dtype)  # bfloat16 rounds 65504 up to 65536
        weight = integers(grid)
        if scale_dtype == torch.bfloat16 and group_size == 32:
            weight.scales[0, :4] = torch.tensor([2.0**-133, 2.0**-126, 2.0**120, -(2.0**120)])
        _, weight = through_file(W4A16, weight)
        assert_same(repack.int4_weight(weight), weight.dequantize())


def test_zero_offset() -> None:
    """A stored zero point of 15 with an offset of one stands for 16, which four bits cannot hold."""
    weight = integers(Grid(4, 32, False, torch.float16))
    assert weight.zero_points is not None
    tensors = dict(AWQ.pack("linear", weight))
    stored = repack.awq_weight(tensors["linear.qweight"], tensors["linear.qzeros"], tensors["linear.scales"])
    shifted = KernelWeight(
        "awq", COLUMNS, DEPTH, stored.weights, stored.scales, stored.offsets, group_shift=5, zero_offset=1
    )
    spread = [values.float().repeat_interleave(32, 1) for values in (weight.zero_points + 1, weight.scales)]
    assert_same(shifted, (weight.codes.float() - spread[0]) * spread[1])


@pytest.mark.parametrize(
    "grid",
    [
        Grid(8, 128, True, torch.float32, "e4m3", 128),
        Grid(8, CHANNEL, True, torch.float32, "e4m3", 1),
        Grid(8, CHANNEL, True, torch.float32, "e4m3", CHANNEL),
    ],
    ids=["blocks", "rows", "tensor"],
)
def test_fp8(grid: Grid) -> None:
    """Every finite code, under scales from float32's subnormal numbers up to 2^100."""
    finite = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    codes = finite[torch.arange(COLUMNS * DEPTH) % len(finite)].view(COLUMNS, DEPTH)
    shape = grid.scale_shape(COLUMNS, DEPTH)
    edges = torch.tensor([0.0, 2.0**-149, 2.0**-130, 2.0**-126, 1e-4, 0.1, 1.0, 448.0, 2.0**100, -0.5])
    for first in range(len(edges)):
        scales = edges[(torch.arange(shape[0] * shape[1]) + first) % len(edges)].view(shape)
        weight = QTensor(grid, codes.view(torch.float8_e4m3fn), scales, None)
        assert_same(repack.fp8_weight(weight), weight.dequantize())
        if shape[0] > 1:
            break  # every edge is some row's scale already


def edge_blocks(layout: str) -> Tensor:
    """ggml blocks whose integers take all values, under every edge of float16 factors."""
    elements, size = BLOCK_BYTES[layout]
    count = COLUMNS * DEPTH // elements
    blocks = torch.arange(count * size).mul(97).add(torch.arange(count * size) // 251).to(torch.uint8).view(count, size)
    blocks ^= random_codes(0, 256, count, size)
    for i, place in enumerate(FACTORS[layout]):
        factors = HALVES[(torch.arange(count) // (1 + 11 * i)) % len(HALVES)]
        blocks[:, place : place + 2] = factors.half().view(torch.uint8).view(-1, 2)
    return blocks.view(COLUMNS, -1)


@pytest.mark.parametrize("layout", list(REPACKS))
def test_ggml(layout: str) -> None:
    """Against gguf's dequantizers."""
    blocks = edge_blocks(layout)
    assert_same(REPACKS[layout](blocks), ggml_weights(layout, blocks).float())


def test_ggml_blocks_hold_every_code() -> None:
    """The blocks above do what they say: every code, scale and minimum occurs."""
    q8 = edge_blocks("q8_0").view(-1, 34)[:, 2:]
    q4 = REPACKS["q4_k"](edge_blocks("q4_k"))
    q6 = REPACKS["q6_k"](edge_blocks("q6_k"))
    assert len(set(q8.flatten().tolist())) == 256
    assert len(set(q4.scales[..., 0].flatten().tolist())) == 64
    assert len(set(q4.scales[..., 1].flatten().tolist())) == 64
    assert len(set(q6.scales.flatten().tolist())) == 256
