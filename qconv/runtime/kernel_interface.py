"""How the CUDA kernels of ``kernels/cuda`` are called: entry names, argument block, grid and shared memory.

``kernels/README.md`` describes the same for readers; the tests hold both against the emulator's build of the sources.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

TILE_COLUMNS = 128
"""Output features of a block of threads."""
TILE_DEPTH = 64
"""Input features of a tile; a slice of k is a whole number of tiles."""
STAGES = 4
HELPER_THREADS = 256
"""Of the blocks of the other kernels."""
ROW_TILES = (8, 16, 32, 64)
"""Rows of the output that a block of threads computes; each has its entry points."""
ACTIVATIONS = {torch.float16: "f16", torch.bfloat16: "bf16"}
ALIGNMENT = 32
"""What input and output features of a weight must be multiples of."""

TILE_BYTES = {
    "awq": (4096, 640),
    "int4": (4096, 640),
    "fp8": (8192, 1024),
    "q8_0": (8192, 512),
    "q4_k": (4096, 1024),
    "q6_k": (6144, 768),
}
"""Per weight layout: bytes of a tile's codes and of its parameters in shared memory."""


class GemmArgs(ctypes.Structure):
    """The one argument of every ``qconv_LAYOUT_mROWS_ACTIVATIONS``, as ``kernels/cuda/tile.cuh`` declares it."""

    _fields_: ClassVar[list[tuple[str, type]]] = [
        ("activations", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("weights_high", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("row_ids", ctypes.c_void_p),
        ("tile_experts", ctypes.c_void_p),
        ("rows", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("depth", ctypes.c_int),
        ("rows_per_input", ctypes.c_int),
        ("group_shift", ctypes.c_int),
        ("zero_offset", ctypes.c_int),
        ("scales_bf16", ctypes.c_int),
    ]


class SumSlicesArgs(ctypes.Structure):
    """The argument of ``qconv_sum_slices_ACTIVATIONS``: float32 [slices, elements] to [elements], in order."""

    _fields_: ClassVar[list[tuple[str, type]]] = [
        ("partials", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("elements", ctypes.c_uint64),
        ("slices", ctypes.c_int),
    ]


class GatherArgs(ctypes.Structure):
    """The argument of ``qconv_gather_columns``: activations in the order of an act-order weight's inputs."""

    _fields_: ClassVar[list[tuple[str, type]]] = [
        ("activations", ctypes.c_void_p),
        ("gather", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("row_ids", ctypes.c_void_p),
        ("tile_experts", ctypes.c_void_p),
        ("rows", ctypes.c_int),
        ("depth", ctypes.c_int),
        ("rows_per_input", ctypes.c_int),
        ("row_tile", ctypes.c_int),
    ]


@dataclass(frozen=True, slots=True)
class KernelWeight:
    """A packed weight, or a stack of experts' weights, in the layout that a kernel reads.

    Attributes:
        layout: Which kernels: a key of :data:`TILE_BYTES`.
        columns: Output features.
        depth: Input features.
        weights: Codes; experts, if any, are the first dimension here and in all that follows.
        scales: Scales of runs of inputs.
        offsets: Zero points, or factors of super-blocks, where the layout has them.
        weights_high: Upper bits of the codes, where the layout has them.
        group_shift: log2 of the inputs that share a scale; 31 for all of them.
        zero_offset: What must be added to stored zero points.
        gather: int32 [..., depth]; the kernel's input i is the linear's input ``gather[i]``. None: in order.
    """

    layout: str
    columns: int
    depth: int
    weights: Tensor
    scales: Tensor
    offsets: Tensor | None = None
    weights_high: Tensor | None = None
    group_shift: int = 31
    zero_offset: int = 0
    gather: Tensor | None = None


def entry_name(layout: str, row_tile: int, activations: torch.dtype) -> str:
    """The entry point for a layout, a row tile and the activations' dtype."""
    return f"qconv_{layout}_m{row_tile}_{ACTIVATIONS[activations]}"


def shared_bytes(layout: str, row_tile: int) -> int:
    """Dynamic shared memory of an entry point."""
    stage = row_tile * TILE_DEPTH * 2 + sum(TILE_BYTES[layout])
    return max(STAGES * -(-stage // 128) * 128, row_tile * 512)


def threads(row_tile: int) -> int:
    """Threads of a block of an entry point."""
    return 64 if row_tile == 8 else 128


def grid(columns: int, row_tiles: int, slices: int) -> tuple[int, int, int]:
    """Blocks in x, y and z for a weight of ``columns`` outputs, so many row tiles and slices of k."""
    return -(-columns // TILE_COLUMNS), row_tiles, slices


def sum_grid(elements: int) -> tuple[int, int, int]:
    """Blocks of ``qconv_sum_slices``: four elements a thread."""
    return -(-elements // (4 * HELPER_THREADS)), 1, 1


def gather_grid(depth: int, row_tiles: int) -> tuple[int, int, int]:
    """Blocks of ``qconv_gather_columns``: eight columns of a row tile a thread; for one linear a tile is a row."""
    return -(-depth // (8 * HELPER_THREADS)), row_tiles, 1


def gemm_args(
    weight: KernelWeight,
    activations: Tensor,
    output: Tensor,
    rows: int,
    *,
    row_ids: Tensor | None = None,
    tile_experts: Tensor | None = None,
    rows_per_input: int = 1,
) -> GemmArgs:
    """The argument block for a product; the tensors must outlive the launch.

    Args:
        weight: The packed weight.
        activations: [input rows, depth], float16 or bfloat16, contiguous.
        output: [rows, columns] of the same dtype, or float32 [slices, rows, columns] for more than one slice of k.
        rows: Rows of the output.
        row_ids: int32, with experts: rows sorted by expert, each expert's padded to whole tiles with ids >= rows.
        tile_experts: int32 [row tiles], with experts: the expert of each tile of ``row_ids``, -1 for none.
        rows_per_input: Row ``r`` is computed from activations row ``r // rows_per_input``.
    """

    def address(tensor: Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    return GemmArgs(
        activations=activations.data_ptr(),
        weights=weight.weights.data_ptr(),
        weights_high=address(weight.weights_high),
        scales=weight.scales.data_ptr(),
        offsets=address(weight.offsets),
        output=output.data_ptr(),
        row_ids=address(row_ids),
        tile_experts=address(tile_experts),
        rows=rows,
        columns=weight.columns,
        depth=weight.depth,
        rows_per_input=rows_per_input,
        group_shift=weight.group_shift,
        zero_offset=weight.zero_offset,
        scales_bf16=int(weight.scales.dtype == torch.bfloat16),
    )
