"""Columns rounded in turn by C++ (``kernels/cpu/turns.cpp``): what :meth:`qconv.core.grid.Run.in_turn` does, sooner.

Sums of shares are formed in an order of their own, so that results may differ from torch's where a target lies in the
middle between two values; they depend neither on the processor nor on the number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from qconv import native
from qconv.core.grid import Run
from qconv.grids.ggml.compiled import lattice_tables
from qconv.grids.ggml.shifted import ShiftedGrid
from qconv.grids.ggml.signed import SignedGrid
from qconv.grids.nearest import Codebook, Floats, Integers, Nearest
from qconv.grids.scales import Scales

LIBRARY = "turns"

_pointer, _int, _count, _float = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class _Run(ctypes.Structure):
    """``struct Run``."""

    _fields_ = (
        ("columns", _count),
        ("rows", _count),
        ("targets", _pointer),
        ("original", _pointer),
        ("shares", _pointer),
        ("values", _pointer),
    )


class _Groups(ctypes.Structure):
    """``struct Groups``."""

    _fields_ = (("of_columns", _pointer), ("steps", _pointer), ("inverses", _pointer), ("bases", _pointer))


class _Codes(ctypes.Structure):
    """``struct Codes``."""

    _fields_ = (
        ("kind", _int),
        ("lowest", _float),
        ("highest", _float),
        ("zeros", _pointer),
        ("smallest_normal", _float),
        ("shift", _float),
        ("count", _int),
        ("values", _pointer),
        ("middles", _pointer),
    )


class _Points(ctypes.Structure):
    """``struct Points``."""

    _fields_ = (("lattice", _pointer), ("metric", _pointer), ("hessian", _pointer), ("shifts", _pointer))


_STEPS = ctypes.CFUNCTYPE(None, *(_pointer,) * 3)
_POINTS = ctypes.CFUNCTYPE(ctypes.c_bool, *(_pointer,) * 3, _int)


def round_steps(run: Run, scales: Scales, inverses: Tensor, nearest: Nearest) -> Tensor | None:
    """Columns that are rounded one by one: the values, or None where no C++ is there for them.

    Args:
        run: The columns.
        scales: Of their groups.
        inverses: Of the scales' steps, float32 [groups, out_features].
        nearest: What codes there are.
    """
    library = native.load(LIBRARY)
    codes = _codes(nearest)
    if library is None or codes is None:
        return None
    values, held = torch.empty(run.original.shape), _Held()
    structures = (
        held.run(run, values),
        held.groups(run.columns, scales, inverses),
        codes,
    )
    _STEPS(("qconv_round_steps", library))(*map(ctypes.addressof, structures))
    return values


def round_points(
    run: Run, scales: Scales, grid: SignedGrid | ShiftedGrid, shifts: Tensor | None = None
) -> Tensor | None:
    """Columns that are rounded eight at a time: the values, or None where no C++ is there for them.

    Args:
        run: The columns.
        scales: Of their groups.
        grid: The lattice.
        shifts: What is added to its points, float32 [groups, out_features]; None where each eight has its own, or none.
    """
    library = native.load(LIBRARY)
    if library is None:
        return None
    values, held = torch.empty(run.original.shape), _Held()
    lattice, _ = lattice_tables(grid)
    optional = (None if part is None else held.address(part) for part in (run.hessian, shifts))
    points = _Points(ctypes.addressof(lattice), held.address(run.metric), *optional)
    structures = (held.run(run, values), held.groups(run.columns, scales, scales.steps), points)
    done = _POINTS(("qconv_round_points", library))(*map(ctypes.addressof, structures), grid.type.id)
    return values if done else None


def _codes(nearest: Nearest) -> _Codes | None:
    """``nearest`` must outlive what it returns."""
    if isinstance(nearest, Integers):
        zeros = None if nearest.zeros is None else nearest.zeros.data_ptr()
        return _Codes(kind=0, lowest=nearest.lowest, highest=nearest.highest, zeros=zeros)
    if isinstance(nearest, Floats):
        return _Codes(kind=1, highest=nearest.highest, smallest_normal=nearest.smallest_normal, shift=nearest.shift)
    if isinstance(nearest, Codebook):
        count, tables = len(nearest.values), (nearest.values.data_ptr(), nearest.middles.data_ptr())
        return _Codes(2, 0.0, 0.0, None, 0.0, 0.0, count, *tables)
    return None


class _Held:
    """What a call's pointers lead to, until it is over."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def address(self, tensor: Tensor) -> int:
        """Of a tensor without gaps, a copy where it has some."""
        self._tensors.append(tensor.contiguous())
        return self._tensors[-1].data_ptr()

    def run(self, run: Run, values: Tensor) -> _Run:
        """The columns, and where their values go."""
        parts = map(self.address, (run.targets, run.original, run.shares.t()))
        return _Run(*run.original.shape, *parts, values.data_ptr())

    def groups(self, columns: Sequence[int], scales: Scales, inverses: Tensor) -> _Groups:
        """The scales of columns by their number."""
        of_columns = torch.tensor(columns, dtype=torch.int32).div_(scales.width, rounding_mode="floor")
        bases = None if scales.bases is None else self.address(scales.bases)
        return _Groups(self.address(of_columns), self.address(scales.steps), self.address(inverses), bases)
