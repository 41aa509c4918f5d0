"""Weights to the bytes of a GGUF tensor.

The encoders in torch operations are the reference and run on any device. On the processor C++ does the same, to the
byte, where it can be compiled (:mod:`qconv.grids.ggml.compiled`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from qconv.errors import UsageError
from qconv.grids.ggml import compiled, direct, ternary
from qconv.grids.ggml.block_types import GgmlType
from qconv.grids.ggml.numeric import HALF_MAX
from qconv.grids.ggml.packing import by_element
from qconv.grids.ggml.searched import SEARCHES

_TILE = 1 << 19
"""Elements. One thread would be faster with a quarter of that, which fits the second-level cache, but several threads
then spend their time waiting for Python's lock between operations."""

_DEVICE_TILE = 1 << 24
"""Elements on a device other than the processor, where launching an operation costs more than its data."""

_LEAST_IMPORTANCE = 1e-6
"""Of the row's mean. A column that matters to nobody must still be approximated, not become arbitrary."""

_DIRECT: dict[GgmlType, Callable[[Tensor], Tensor]] = {
    GgmlType.F32: direct.f32,
    GgmlType.F16: direct.f16,
    GgmlType.BF16: direct.bf16,
    GgmlType.Q8_0: direct.q8_0,
    GgmlType.Q4_0: direct.q4_0,
    GgmlType.Q4_1: direct.q4_1,
    GgmlType.Q5_0: direct.q5_0,
    GgmlType.Q5_1: direct.q5_1,
    GgmlType.MXFP4: direct.mxfp4,
    GgmlType.TQ1_0: ternary.tq1_0,
    GgmlType.TQ2_0: ternary.tq2_0,
}
_FLOAT_MAX = torch.finfo(torch.float32).max
_WITHOUT_HALVES = (GgmlType.F32, GgmlType.BF16, GgmlType.MXFP4)


def encode(weight: Tensor, type: GgmlType, importance: Tensor | None = None) -> Tensor:
    """Encode a weight as rows of ggml blocks.

    F32, F16, BF16, Q8_0 and MXFP4, and without importance Q4_0, Q4_1, Q5_0, Q5_1, TQ1_0 and TQ2_0, follow ggml's
    formulas to the byte. All else searches for the least ``sum importance * (weight - decoded)^2``, importance being 1
    where none is given. It has no effect on the types that search nothing.

    Args:
        weight: [rows, columns], any float dtype, any device; not changed.
        type: The block type.
        importance: float [columns], not negative: the mean squared input of each column (imatrix). Zeros alone count
            as None.

    Returns:
        uint8 [rows, type.row_bytes(columns)] on the weight's device.

    Raises:
        UsageError: the block does not divide the row, a weight is not finite or too large for float16 scales, or the
            importance does not fit.
    """
    columns = weight.shape[1]
    encoded = torch.empty(len(weight), type.row_bytes(columns), dtype=torch.uint8, device=weight.device)
    importance = None if importance is None else _normalized(importance.to(weight.device), columns)
    searched = type in SEARCHES and (importance is not None or type not in _DIRECT)
    if weight.device.type == "cpu":
        limit = _FLOAT_MAX if type in _WITHOUT_HALVES else HALF_MAX
        grid = SEARCHES[type].grid if searched else None
        largest = compiled.encode_into(encoded, weight, type, grid, importance, limit)
        if largest is not None:
            _require_range(largest, type)
            return encoded
    for start, stop in _tiles(weight, type, searched):
        tile = weight[start:stop]
        encoded[start:stop] = _searched(tile, type, importance) if searched else _directly(tile, type)
    return encoded


def _directly(tile: Tensor, type: GgmlType) -> Tensor:
    blocks = tile.reshape(-1, type.block_elements).float()
    _require_range(_largest(blocks), type)
    return _DIRECT[type](blocks).view(len(tile), -1)


def _searched(tile: Tensor, type: GgmlType, importance: Tensor | None) -> Tensor:
    search = SEARCHES[type]
    blocks = tile.reshape(-1, type.block_elements)
    padding = -len(blocks) % search.lanes
    weights = by_element(blocks, search.subblocks, padding)
    _require_range(_largest(weights), type)
    spread = None
    if importance is not None:  # the same for every row
        row = by_element(importance.view(-1, type.block_elements), search.subblocks)
        spread = functional.pad(row.repeat(1, 1, len(tile)), (0, padding), value=1.0)
    return search.encode(weights, spread)[: len(blocks)].view(len(tile), -1)


def _tiles(weight: Tensor, type: GgmlType, searched: bool) -> Iterator[tuple[int, int]]:
    """Ranges of rows that are worked through together; those of a search fill lanes without padding."""
    rows, columns = weight.shape
    elements = _TILE if weight.device.type == "cpu" else _DEVICE_TILE
    lanes = SEARCHES[type].lanes if searched else 1
    unit = lanes // math.gcd(lanes, columns // type.block_elements)
    step = unit * max(1, round(elements / (columns * unit))) if columns else 1
    for start in range(0, rows if columns else 0, step):
        yield start, min(start + step, rows)


def _largest(weights: Tensor) -> float:
    """The largest magnitude; NaN if one of them is."""
    return float(weights.abs().amax())


def _require_range(largest: float, type: GgmlType) -> None:
    if not largest < float("inf"):
        raise UsageError(
            "the weight holds NaN or infinite values",
            hint="The checkpoint is damaged or its weights overflowed: fetch it again.",
        )
    if largest > HALF_MAX and type not in _WITHOUT_HALVES:
        raise UsageError(
            f"a weight of magnitude {largest:.6g} is beyond float16, of which {type.name} is made",
            hint="Store this tensor as BF16 or F32.",
        )


def _normalized(importance: Tensor, columns: int) -> Tensor | None:
    """float32 [columns] with mean 1 and no zeros; None where all columns are alike."""
    if importance.shape != (columns,):
        raise UsageError(
            f"the importance has shape {list(importance.shape)}, the rows have {columns} columns",
            hint="Give one importance per column, from the imatrix of this model.",
        )
    importance = importance.double()
    low, high = float(importance.amin()), float(importance.amax())
    if not (low >= 0.0 and high < float("inf")):
        raise UsageError("the importance holds negative, infinite or NaN values", hint="Collect the imatrix again.")
    if low == high:
        return None
    return (importance / importance.mean()).clamp_(min=_LEAST_IMPORTANCE).float()
