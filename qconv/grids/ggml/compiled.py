"""The encoders in C++ (``kernels/cpu/ggml.cpp``) on matrices in memory: the bytes of the torch operations, sooner."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from qconv import native
from qconv.core.once import MadeOnce
from qconv.grids.ggml.affine import AffineGrid
from qconv.grids.ggml.block_types import GgmlType
from qconv.grids.ggml.lattice import lattice
from qconv.grids.ggml.scaled import ScaledGrid
from qconv.grids.ggml.shifted import ShiftedGrid
from qconv.grids.ggml.signed import SignedGrid

LIBRARY = "ggml"

_NO_ENCODER = -1.0

_pointer, _int, _count, _float = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
_MATRIX = (_int, _pointer, _int, _count, _count, _float)  # type, weights, dtype, rows, columns, limit
_DIRECTLY = ctypes.CFUNCTYPE(_float, *_MATRIX, _pointer)
_BY_SEARCH = ctypes.CFUNCTYPE(_float, *_MATRIX, _pointer, _int, _pointer, _pointer, _pointer)


class LatticeTables(ctypes.Structure):
    """``struct Lattice``."""

    _fields_ = (
        ("runs", _int),
        ("low", _pointer),
        ("high", _pointer),
        ("starts", _pointer),
        ("points", _pointer),
        ("levels", _pointer),
        ("inverse_middle", _float),
    )


@MadeOnce
def lattice_tables(grid: SignedGrid | ShiftedGrid) -> tuple[LatticeTables, list[Tensor]]:
    """What the C++ is told of a lattice, and the memory that it points to."""
    found = lattice(grid.type, torch.device("cpu"))
    tables = [found.low.int(), found.high.int(), found.starts.int(), found.points, found.levels]
    pointers = [table.data_ptr() for table in tables]
    return LatticeTables(len(found.high), *pointers, 1.0 / grid.middle), tables


def encode_into(
    encoded: Tensor,
    weight: Tensor,
    type: GgmlType,
    grid: AffineGrid | ScaledGrid | SignedGrid | ShiftedGrid | None,
    importance: Tensor | None,
    limit: float,
) -> float | None:
    """Encode a weight, unless no C++ is there for it.

    Args:
        encoded: uint8 [rows, bytes of a row], contiguous; filled.
        weight: [rows, columns], any float dtype and strides.
        type: The block type.
        grid: What a search looks for; None where the type's formula is followed.
        importance: float32 [columns], positive, or None.
        limit: No weight may be larger in magnitude.

    Returns:
        None if there is no such encoder; else 0, or the magnitude of a weight that is NaN, infinite or beyond the
        limit: then the bytes are not complete.
    """
    library = native.load(LIBRARY)
    if library is None:
        return None
    if weight.dtype not in native.DTYPES:
        weight = weight.float()
    weight = weight.contiguous()
    rows, columns = weight.shape
    matrix = (type.id, weight.data_ptr(), native.DTYPES[weight.dtype], rows, columns, limit)
    if grid is None:
        found = _DIRECTLY(("qconv_encode_directly", library))(*matrix, encoded.data_ptr())
    else:
        starts = torch.tensor(grid.starts(weighted=importance is not None), dtype=torch.float32)
        columns_importance = None if importance is None else importance.data_ptr()
        held = lattice_tables(grid) if isinstance(grid, SignedGrid | ShiftedGrid) else None  # until the call is over
        points = None if held is None else ctypes.addressof(held[0])
        found = _BY_SEARCH(("qconv_encode_by_search", library))(
            *matrix, columns_importance, len(starts), starts.data_ptr(), points, encoded.data_ptr()
        )
    return None if found == _NO_ENCODER else float(found)
