"""Products with packed weights: which kernel is launched, on which grid, after and before which helpers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qconv.runtime.backends.cuda.launch import Launch, Launcher
from qconv.runtime.backends.cuda.sources import source_of
from qconv.runtime.kernel_interface import (
    ACTIVATIONS,
    HELPER_THREADS,
    ROW_TILES,
    TILE_COLUMNS,
    TILE_DEPTH,
    GatherArgs,
    KernelWeight,
    SumSlicesArgs,
    entry_name,
    gather_grid,
    gemm_args,
    grid,
    shared_bytes,
    sum_grid,
    threads,
)

HELPERS = "helpers"
_MOST_BLOCKS = 65535
"""Of a grid along y."""
_LEAST_TILES = 8
"""A slice of k below this many tiles spends most of its time filling its pipeline."""
_MOST_SLICES = 16
_LEAST_THREADS = 256
"""Of a multiprocessor: with fewer, too few bytes are under way and its schedulers wait for one warp each."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Which rows a product has, and from which inputs.

    Attributes:
        count: Rows of the output.
        per_input: Row r comes from row ``r // per_input`` of the activations.
        tile: Rows of a block of threads, of ``ROW_TILES``.
        ids: With experts, int32 [tiles * tile]: rows sorted by expert, padded with ``count``.
        experts: With experts, int32 [tiles]: the expert of each tile, -1 for none.
    """

    count: int
    per_input: int
    tile: int
    ids: Tensor | None = None
    experts: Tensor | None = None

    @property
    def tiles(self) -> int:
        """Tiles of rows."""
        return -(-self.count // self.tile) if self.experts is None else len(self.experts)


def row_tile(rows: int) -> int:
    """The smallest tile that holds so many rows, or the largest one."""
    return next((tile for tile in ROW_TILES if rows <= tile), ROW_TILES[-1])


def slices_of(columns: int, depth: int, busy_tiles: int, tile: int, multiprocessors: int) -> int:
    """Into how many slices k is split: eight warps for each multiprocessor, as far as k is long enough.

    Args:
        columns: Outputs of the weight.
        depth: Its inputs.
        busy_tiles: Tiles of rows that have work.
        tile: Rows of each.
        multiprocessors: Of the device.
    """
    blocks, wanted = -(-columns // TILE_COLUMNS) * busy_tiles, multiprocessors * _LEAST_THREADS // threads(tile)
    return max(1, min(wanted // blocks, -(-depth // TILE_DEPTH) // _LEAST_TILES, _MOST_SLICES))


def multiply(launcher: Launcher, weight: KernelWeight, inputs: Tensor, rows: Rows) -> Tensor:
    """``inputs @ weight.T`` for the rows, each with its expert's weight, summed in float32.

    Args:
        launcher: Runs it.
        weight: On the inputs' device.
        inputs: float16 or bfloat16 [rows.count / rows.per_input, depth], contiguous, aligned to 16 bytes.
        rows: Which rows.

    Returns:
        [rows.count, columns] in the inputs' dtype.
    """
    if weight.gather is not None:
        inputs, rows = _gathered(launcher, weight.gather, inputs, rows), replace(rows, per_input=1)
    # Padding tiles end at once, so a tile counts as busy only if rows could fill it.
    busy = min(rows.tiles, rows.count)
    slices = slices_of(weight.columns, weight.depth, busy, rows.tile, launcher.multiprocessors)
    output = inputs.new_empty(rows.count, weight.columns)
    target = output if slices == 1 else inputs.new_empty(slices, *output.shape, dtype=torch.float32)
    arguments = gemm_args(
        weight,
        inputs,
        target,
        rows.count,
        row_ids=rows.ids,
        tile_experts=rows.experts,
        rows_per_input=rows.per_input,
    )
    read = {
        "activations": inputs,
        "weights": weight.weights,
        "weights_high": weight.weights_high,
        "scales": weight.scales,
        "offsets": weight.offsets,
        "row_ids": rows.ids,
        "tile_experts": rows.experts,
    }
    launcher.launch(
        Launch(
            source=source_of(weight.layout),
            kernel=entry_name(weight.layout, rows.tile, inputs.dtype),
            grid=grid(weight.columns, rows.tiles, slices),
            threads=threads(rows.tile),
            shared_bytes=shared_bytes(weight.layout, rows.tile),
            arguments=bytes(arguments),
            inputs=_present(read),
            output=target,
        )
    )
    if slices > 1:
        _sum_slices(launcher, target, output)
    return output


def _sum_slices(launcher: Launcher, partials: Tensor, output: Tensor) -> None:
    """float32 [slices, ...] to [...] of 16 bits."""
    elements = output.numel()
    arguments = SumSlicesArgs(partials.data_ptr(), output.data_ptr(), elements, len(partials))
    launcher.launch(
        Launch(
            source=source_of(HELPERS),
            kernel=f"qconv_sum_slices_{ACTIVATIONS[output.dtype]}",
            grid=sum_grid(elements),
            threads=HELPER_THREADS,
            shared_bytes=0,
            arguments=bytes(arguments),
            inputs={"partials": partials},
            output=output,
        )
    )


def _gathered(launcher: Launcher, gather: Tensor, inputs: Tensor, rows: Rows) -> Tensor:
    """Each row's activations in its weight's order of inputs, [rows.count, depth]."""
    depth = inputs.shape[1]
    output = inputs.new_empty(rows.count, depth)
    tile = rows.tile if rows.experts is not None else -(-rows.count // _MOST_BLOCKS)
    tiles = rows.tiles if rows.experts is not None else -(-rows.count // tile)
    read = {"activations": inputs, "gather": gather, "row_ids": rows.ids, "tile_experts": rows.experts}
    addresses = (read["activations"], read["gather"], output, read["row_ids"], read["tile_experts"])
    arguments = GatherArgs(
        *(None if tensor is None else tensor.data_ptr() for tensor in addresses),
        rows.count,
        depth,
        rows.per_input,
        tile,
    )
    launcher.launch(
        Launch(
            source=source_of(HELPERS),
            kernel="qconv_gather_columns",
            grid=gather_grid(depth, tiles),
            threads=HELPER_THREADS,
            shared_bytes=0,
            arguments=bytes(arguments),
            inputs=_present(read),
            output=output,
        )
    )
    return output


def _present(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
