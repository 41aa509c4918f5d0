"""Rounding to integer grids in C++ (``kernels/cpu/rounding.cpp``): the numbers of the torch operations, sooner.

Every function gives None, or False, where no C++ is there for its arguments, such as a device's tensors; then torch has
the same work to do.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from qconv import native
from qconv.core.qtensor import Grid, QTensor, SquaredError

LIBRARY = "rounding"


_pointer, _int, _count = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_EXTREMES = ctypes.CFUNCTYPE(None, _pointer, _int, _count, _count, _pointer, _pointer)
_ENCODE = ctypes.CFUNCTYPE(None, _pointer, _int, _count, _count, _int, _pointer, _pointer, _pointer)
_ROUND = ctypes.CFUNCTYPE(None, _pointer, _count, _count, _int, _pointer, _pointer)
_SQUARED_ERROR = ctypes.CFUNCTYPE(None, _pointer, _int, _count, _count, _count, _int, *(_pointer,) * 6)


def extremes(block: Tensor, groups: int) -> tuple[Tensor, Tensor] | None:
    """The smallest and the largest weight of each group, float32 [rows, groups].

    Args:
        block: [rows, columns], any float dtype, finite.
        groups: Of a row.
    """
    library = _library(block)
    if library is None or block.dtype not in native.DTYPES:
        return None
    block = block.contiguous()
    rows, columns = block.shape
    low, high = torch.empty(rows, groups), torch.empty(rows, groups)
    _EXTREMES(("qconv_extremes", library))(
        block.data_ptr(), native.DTYPES[block.dtype], rows * groups, columns // groups, low.data_ptr(), high.data_ptr()
    )
    return low, high


def encode(block: Tensor, scales: Tensor, zero_points: Tensor | None, grid: Grid) -> Tensor | None:
    """Codes, uint8 [rows, columns].

    Args:
        block: [rows, columns], any float dtype, finite.
        scales: [rows, groups], positive.
        zero_points: uint8 [rows, groups], or None on a symmetric grid.
        grid: The grid.
    """
    library = _library(block)
    if library is None or block.dtype not in native.DTYPES:
        return None
    block, parameters = block.contiguous(), _parameters(scales, zero_points)
    codes = torch.empty(block.shape, dtype=torch.uint8)
    _ENCODE(("qconv_encode", library))(
        block.data_ptr(),
        native.DTYPES[block.dtype],
        scales.numel(),
        block.shape[1] // scales.shape[1],
        grid.levels,
        *map(_address, parameters),
        codes.data_ptr(),
    )
    return codes


def round_(block: Tensor, scales: Tensor, zero_points: Tensor | None, grid: Grid) -> bool:
    """Round to the grid and back, in place; whether it was done.

    Args:
        block: float32 [rows, columns], contiguous, finite.
        scales: [rows, groups], positive.
        zero_points: uint8 [rows, groups], or None on a symmetric grid.
        grid: The grid.
    """
    library = _library(block)
    if library is None:
        return False
    parameters = _parameters(scales, zero_points)
    _ROUND(("qconv_round", library))(
        block.data_ptr(), scales.numel(), block.shape[1] // scales.shape[1], grid.levels, *map(_address, parameters)
    )
    return True


def squared_error(
    source: Tensor, weight: QTensor, in_scale: Tensor | None, out_scale: Tensor | None
) -> SquaredError | None:
    """Signal and noise of a quantized weight against its source after folding.

    Args:
        source: [out_features, in_features], any float dtype, finite.
        weight: The same shape.
        in_scale: Factors on the source's columns, float32 [in_features], or None.
        out_scale: Divisors of its rows, float32 [out_features], or None.
    """
    library = _library(source)
    plain = not weight.grid.is_float and not weight.grid.based and weight.group_index is None
    supported = source.dtype in native.DTYPES and plain
    if library is None or not supported:
        return None
    parameters = _parameters(weight.scales, weight.zero_points)
    # What a pointer leads to must live until the call is over.
    tensors = [None if one is None else one.contiguous() for one in (weight.codes, *parameters, in_scale, out_scale)]
    source, sums = source.contiguous(), torch.empty(2, dtype=torch.float64)
    _SQUARED_ERROR(("qconv_squared_error", library))(
        source.data_ptr(),
        native.DTYPES[source.dtype],
        *source.shape,
        weight.grid.width(source.shape[1]),
        weight.grid.levels,
        *map(_address, tensors),
        sums.data_ptr(),
    )
    return SquaredError(*sums.tolist())


def _library(block: Tensor) -> ctypes.CDLL | None:
    """What rounds a tensor whose address is one of this process."""
    return native.load(LIBRARY) if block.device.type == "cpu" else None


def _parameters(scales: Tensor, zero_points: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """As float32 without gaps."""
    return scales.float().contiguous(), None if zero_points is None else zero_points.float().contiguous()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
