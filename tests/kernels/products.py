"""Products to run on the emulator, with their float64 references."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import gguf
import torch
from torch import Tensor

from qconv.core.qtensor import Grid, QTensor
from qconv.formats.awq import pack_words
from qconv.runtime import repack
from qconv.runtime.kernel_interface import KernelWeight, entry_name, gemm_args, grid
from tests.kernels.emulator import SCHEDULES, Report, Schedule, emulator


@dataclass(frozen=True, slots=True)
class Case:
    """A packed weight, or a stack of experts', and the weights that it stands for: float64 [experts, N, K]."""

    packed: KernelWeight
    exact: Tensor


def random_codes(seed: int, levels: int, *shape: int) -> Tensor:
    """uint8 below ``levels``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, levels, shape, generator=generator, dtype=torch.uint8)


def integer_weight(columns: int, depth: int, group_size: int, seed: int = 0, *, act_order: bool = False) -> QTensor:
    """Four bits with zero points, float16 scales over two orders of magnitude."""
    generator = torch.Generator().manual_seed(seed + 1000)
    groups = depth // group_size
    index = None
    if act_order:
        index = torch.arange(depth).div(group_size, rounding_mode="floor")[torch.randperm(depth, generator=generator)]
        index = index.to(torch.int32)
    return QTensor(
        Grid(4, group_size, False, torch.float16, act_order=act_order),
        random_codes(seed, 16, columns, depth),
        (10 ** -(1 + 2 * torch.rand(columns, groups, generator=generator))).half(),
        random_codes(seed + 1, 16, columns, groups),
        index,
    )


def stack(weights: list[KernelWeight]) -> KernelWeight:
    """Experts' weights one after the other."""
    values = {field.name: getattr(weights[0], field.name) for field in fields(KernelWeight)}
    for name, value in values.items():
        if isinstance(value, Tensor):
            values[name] = torch.stack([getattr(weight, name) for weight in weights])
    return KernelWeight(**values)


def awq(columns: int, depth: int, group_size: int = 128, experts: int = 1) -> Case:
    """AWQ's checkpoint tensors."""
    weights = [integer_weight(columns, depth, group_size, seed) for seed in range(experts)]
    packed = []
    for weight in weights:
        assert weight.zero_points is not None
        words, zeros = (pack_words(codes.t().contiguous()) for codes in (weight.codes, weight.zero_points))
        packed.append(repack.awq_weight(words, zeros, weight.scales.t().contiguous()))
    return Case(stack(packed), exact(weights))


def int4(columns: int, depth: int, group_size: int = 128, experts: int = 1, *, act_order: bool = False) -> Case:
    """GPTQ and compressed-tensors, octet-major. The reference has its inputs in the kernel's order."""
    weights = [integer_weight(columns, depth, group_size, seed, act_order=act_order) for seed in range(experts)]
    packed = [repack.int4_weight(weight) for weight in weights]
    reference = exact(weights)
    for expert, weight in enumerate(packed):
        if weight.gather is not None:
            reference[expert] = reference[expert][:, weight.gather]
    return Case(stack(packed), reference)


def fp8(columns: int, depth: int, group_size: int = 128, experts: int = 1) -> Case:
    """E4M3 in blocks of 128 outputs by ``group_size`` inputs, every finite code."""
    grid = Grid(8, group_size, True, torch.float32, "e4m3", 128)
    weights = []
    for seed in range(experts):
        codes = random_codes(seed, 0x7F, columns, depth) | random_codes(seed + 1, 2, columns, depth) << 7
        scales = 10 ** -(1 + 3 * torch.rand(grid.scale_shape(columns, depth), generator=_generator(seed)))
        weights.append(QTensor(grid, codes.view(torch.float8_e4m3fn), scales, None))
    return Case(stack([repack.fp8_weight(weight) for weight in weights]), exact(weights))


BLOCK_BYTES = {"q8_0": (32, 34), "q4_k": (256, 144), "q6_k": (256, 210)}
FACTORS = {"q8_0": (0,), "q4_k": (0, 2), "q6_k": (208,)}
"""Where the float16 factors of a block lie."""
REPACKS = {"q8_0": repack.q8_0_weight, "q4_k": repack.q4_k_weight, "q6_k": repack.q6_k_weight}


def random_blocks(layout: str, columns: int, depth: int, seed: int) -> Tensor:
    """ggml blocks of a weight: every bit random but for the factors, which are numbers of usual size."""
    elements, size = BLOCK_BYTES[layout]
    blocks = random_codes(seed, 256, columns, depth // elements, size)
    for place in FACTORS[layout]:
        factors = 10 ** -(2 + 2 * torch.rand(columns, depth // elements, 1, generator=_generator(seed + place)))
        blocks[..., place : place + 2] = factors.half().view(torch.uint8)
    return blocks.view(columns, -1)


def ggml_weights(layout: str, blocks: Tensor) -> Tensor:
    """float64 [N, K], by gguf's own dequantizer."""
    weights = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[layout.upper()])
    return torch.from_numpy(weights).double()


def ggml(layout: str, columns: int, depth: int, group_size: int = 256, experts: int = 1) -> Case:
    """ggml's types."""
    blocks = [random_blocks(layout, columns, depth, seed) for seed in range(experts)]
    packed = stack([REPACKS[layout](expert) for expert in blocks])
    return Case(packed, torch.stack([ggml_weights(layout, expert) for expert in blocks]))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed + 1000)


def exact(weights: list[QTensor]) -> Tensor:
    """float64 [experts, N, K]; the float32 weights are exact for integer codes and 16-bit scales."""
    return torch.stack([weight.dequantize().double() for weight in weights])


CASES: dict[str, Callable[..., Case]] = {
    "awq": awq,
    "int4": int4,
    "fp8": fp8,
    "q8_0": functools.partial(ggml, "q8_0"),
    "q4_k": functools.partial(ggml, "q4_k"),
    "q6_k": functools.partial(ggml, "q6_k"),
}


def depth_of(layout: str) -> int:
    """What the inputs of a weight must be a multiple of."""
    return 256 if layout in ("q4_k", "q6_k") else 32


@functools.cache
def case(
    layout: str, columns: int, depth: int, group_size: int = 64, experts: int = 1, zero_offset: int | None = None
) -> Case:
    """A case by its layout; made once, not to be written to. With ``zero_offset`` zero points are stored less that."""
    if zero_offset is None:
        return CASES[layout](columns, depth, group_size, experts)
    stored = case(layout, columns, depth, group_size, experts)
    scales = stored.packed.scales.double().transpose(1, 2).repeat_interleave(group_size, 2)
    return Case(replace(stored.packed, zero_offset=zero_offset), stored.exact - zero_offset * scales)


def activations(rows: int, depth: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers."""
    return torch.randn(rows, depth, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclass(frozen=True, slots=True)
class Result:
    """What a launch wrote, what float64 arithmetic gives, what the emulator saw."""

    output: Tensor
    reference: Tensor
    report: Report

    @property
    def relative_error(self) -> float:
        """Of the whole output, in the Frobenius norm; NaN if an element was not written."""
        return float((self.output.double() - self.reference).norm() / self.reference.norm())


def run_dense(
    case: Case,
    tokens: Tensor,
    row_tile: int,
    slices: int = 1,
    *,
    schedule: Schedule = SCHEDULES[0],
    traffic: bool = False,
    check: bool = True,
    bug: str = "",
) -> Result:
    """tokens [rows, K] times one weight. With several slices of k the output is their sum, in float32."""
    weight, rows = case.packed, len(tokens)
    output = _unwritten(weight, rows, slices, tokens.dtype)
    report = emulator(weight.layout).launch(
        entry_name(weight.layout, row_tile, tokens.dtype),
        grid(weight.columns, -(-rows // row_tile), slices),
        gemm_args(weight, tokens, output, rows),
        {"activations": tokens, **_tensors(weight)},
        {"output": output},
        schedule=schedule,
        traffic=traffic,
        check=check,
        bug=bug,
    )
    reference = tokens.double() @ case.exact[0].t()
    return Result(output.sum(0) if slices > 1 else output, reference, report)


@dataclass(frozen=True, slots=True)
class Routing:
    """Rows sorted by expert for the grouped kernels.

    Attributes:
        experts: [rows] the expert of each row of the output.
        row_ids: int32, each expert's rows, padded with the number of rows to whole tiles.
        tile_experts: int32, the expert of each tile, -1 for tiles of padding only.
    """

    experts: Tensor
    row_ids: Tensor
    tile_experts: Tensor


def route(experts: Tensor, row_tile: int, spare_tiles: int = 1) -> Routing:
    """Group rows by expert, with tiles of padding at the end as a host that cannot know the count leaves them."""
    rows, ids, tiles = len(experts), [], []
    for expert in sorted(set(experts.tolist())):
        mine = (experts == expert).nonzero().flatten().tolist()
        mine += [rows] * (-len(mine) % row_tile)
        ids += mine
        tiles += [expert] * (len(mine) // row_tile)
    ids += [rows] * (spare_tiles * row_tile)
    tiles += [-1] * spare_tiles
    return Routing(experts, torch.tensor(ids, dtype=torch.int32), torch.tensor(tiles, dtype=torch.int32))


def run_experts(
    case: Case,
    tokens: Tensor,
    routing: Routing,
    row_tile: int,
    rows_per_input: int,
    slices: int = 1,
    *,
    schedule: Schedule = SCHEDULES[0],
    traffic: bool = False,
    check: bool = True,
    bug: str = "",
) -> Result:
    """Row r of the output is tokens[r / rows_per_input] times the weight of its expert."""
    weight, rows = case.packed, len(routing.experts)
    output = _unwritten(weight, rows, slices, tokens.dtype)
    args = gemm_args(
        weight,
        tokens,
        output,
        rows,
        row_ids=routing.row_ids,
        tile_experts=routing.tile_experts,
        rows_per_input=rows_per_input,
    )
    report = emulator(weight.layout).launch(
        entry_name(weight.layout, row_tile, tokens.dtype),
        grid(weight.columns, len(routing.tile_experts), slices),
        args,
        {
            "activations": tokens,
            "row_ids": routing.row_ids,
            "tile_experts": routing.tile_experts,
            **_tensors(weight),
        },
        {"output": output},
        schedule=schedule,
        traffic=traffic,
        check=check,
        bug=bug,
    )
    inputs = tokens.double()[torch.arange(rows) // rows_per_input]
    reference = torch.einsum("rk,rnk->rn", inputs, case.exact[routing.experts])
    return Result(output.sum(0) if slices > 1 else output, reference, report)


def _unwritten(weight: KernelWeight, rows: int, slices: int, dtype: torch.dtype) -> Tensor:
    """An output full of NaN, so that an element that is left out shows."""
    if slices == 1:
        return torch.full((rows, weight.columns), float("nan"), dtype=dtype)
    return torch.full((slices, rows, weight.columns), float("nan"))


def _tensors(weight: KernelWeight) -> dict[str, Tensor | None]:
    names = ("weights", "weights_high", "scales", "offsets")
    return {name: getattr(weight, name) for name in names}
