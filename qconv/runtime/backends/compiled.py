"""The C++ of the cpu backend (``kernels/cpu/runtime.cpp``) on packed weights in memory."""

from __future__ import annotations

import ctypes
import enum
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from qconv import native
from qconv.core.qtensor import CHANNEL
from qconv.formats import gptq
from qconv.runtime.packed import BlockWeight, DenseWeight, FloatWeight, IntegerWeight, PackedWeight
from qconv.runtime.repack import as_e4m3

LIBRARY = "runtime"
KEPT_BYTES = 2**26
"""The most memory that a thread keeps for dense weights: two projections of an expert of the 480B."""

_pointer, _int, _count = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_AWQ, _GPTQ, _ROWS, _E4M3 = range(4)
_INTEGER_LAYOUTS = {"awq": _AWQ, "gptq": _GPTQ, "w4a16": _ROWS}
_BLOCK_LAYOUTS = {
    GGMLQuantizationType.Q8_0: 4,
    GGMLQuantizationType.Q4_0: 5,
    GGMLQuantizationType.Q4_K: 6,
    GGMLQuantizationType.Q5_K: 7,
    GGMLQuantizationType.Q6_K: 8,
}
"""As ``enum class Layout`` numbers them."""


class _Weight(ctypes.Structure):
    """``struct Weight``."""

    _fields_ = (
        ("layout", _int),
        ("bits", _int),
        ("outputs", _count),
        ("inputs", _count),
        ("group", _count),
        ("block_rows", _count),
        ("scale_dtype", _int),
        ("zero_offset", _int),
        ("codes", _pointer),
        ("scales", _pointer),
        ("zeros", _pointer),
        ("group_index", _pointer),
    )


_DEQUANTIZE = ctypes.CFUNCTYPE(None, _pointer, _int, _pointer, _count, _int)
_PRODUCT = ctypes.CFUNCTYPE(None, _pointer, _pointer, _int, _count, _pointer, _int)
_EXPERTS = ctypes.CFUNCTYPE(
    None, *[_pointer] * 4, _int, *[_pointer] * 3, _count, _pointer, _pointer, _int
)  # gates, ups, downs, x, dtype, expert, token, factor, pairs, y, scratch, threads
_TILE_UNITS = ctypes.CFUNCTYPE(_int)
_TILES_FROM = ctypes.CFUNCTYPE(_int, _pointer)
_TILE_PRODUCT = ctypes.CFUNCTYPE(None, _pointer, _pointer, _count, _pointer, _int, _int)
_TILE_EXPERTS = ctypes.CFUNCTYPE(
    None, *[_pointer] * 3, _count, *[_pointer] * 3, _count, _count, _pointer, _int, _int
)  # gates, ups, downs, experts, x, chosen, factor, tokens, top_k, y, units, threads


class Units(enum.IntEnum):
    """What products of many rows are computed with, as ``enum class Units`` numbers them."""

    TORCH = 0
    """A dense weight and torch's own operation."""
    AVX512 = 1
    AMX = 2


class Scratch:
    """Memory for one dense weight, kept from weight to weight: fresh pages cost more than filling them does."""

    def __init__(self) -> None:
        self._kept = threading.local()

    def take(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Uninitialized memory of that shape, the same for all callers of a thread unless it is large."""
        nbytes = shape[0] * shape[1] * dtype.itemsize
        if nbytes > KEPT_BYTES:
            return torch.empty(shape, dtype=dtype)
        buffer: Tensor | None = getattr(self._kept, "buffer", None)
        if buffer is None or buffer.nbytes < nbytes:
            buffer = self._kept.buffer = torch.empty(nbytes, dtype=torch.uint8)
        return buffer[:nbytes].view(dtype).view(shape)


@dataclass(frozen=True, slots=True)
class Compiled:
    """The library's functions."""

    dequantize_function: ctypes._CFunctionType
    product_function: ctypes._CFunctionType
    experts_function: ctypes._CFunctionType
    tiles_from_function: ctypes._CFunctionType
    tile_product_function: ctypes._CFunctionType
    tile_experts_function: ctypes._CFunctionType
    scratch: Scratch
    units: Units
    """The best of what this process may use."""

    @classmethod
    def load(cls) -> Compiled | None:
        """The functions; None where there is no compiler, or it is not to be used."""
        library = native.load(LIBRARY)
        if library is None:
            return None
        return cls(
            _DEQUANTIZE(("qconv_dequantize", library)),
            _PRODUCT(("qconv_product", library)),
            _EXPERTS(("qconv_experts", library)),
            _TILES_FROM(("qconv_tiles_from", library)),
            _TILE_PRODUCT(("qconv_tile_product", library)),
            _TILE_EXPERTS(("qconv_tile_experts", library)),
            Scratch(),
            Units(_TILE_UNITS(("qconv_tile_units", library))()),
        )

    def dequantize(self, weights: Sequence[CompiledWeight], dtype: torch.dtype) -> Tensor:
        """Weights of one layout below each other, float32 or bfloat16 [all out_features, in_features], any strides.

        It is valid until this thread asks for the next one.
        """
        columns, transposed = weights[0].shape[1], weights[0].transposed
        rows = sum(weight.shape[0] for weight in weights)
        out = self.scratch.take((columns, rows) if transposed else (rows, columns), dtype)
        start = 0
        for weight in weights:
            part = out[:, start:] if transposed else out[start:]
            self.dequantize_function(
                weight.address, native.DTYPES[dtype], part.data_ptr(), out.stride(0), torch.get_num_threads()
            )
            start += weight.shape[0]
        return out.t() if transposed else out

    def product(self, weight: CompiledWeight, inputs: Tensor) -> Tensor:
        """``inputs @ weight.T``, float32; inputs are [rows, in_features] of any float dtype."""
        inputs = inputs.contiguous()
        out = torch.empty(len(inputs), weight.shape[0])
        self.product_function(
            weight.address,
            inputs.data_ptr(),
            native.DTYPES[inputs.dtype],
            len(inputs),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def experts(self, experts: CompiledExperts, inputs: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """As an :class:`qconv.runtime.backends.base.ExpertsOperator`, with SiLU, each token on its own; float32."""
        inputs = inputs.contiguous()
        tokens, top_k = chosen.shape
        expert, factor = chosen.contiguous(), weights.float().contiguous()
        token = torch.arange(tokens).repeat_interleave(top_k)
        out = torch.zeros(inputs.shape)
        scratch = torch.empty(tokens * top_k * (2 * experts.width + inputs.shape[1]))
        self.experts_function(
            *(ctypes.addressof(array) for array in experts.arrays),
            inputs.data_ptr(),
            native.DTYPES[inputs.dtype],
            expert.data_ptr(),
            token.data_ptr(),
            factor.data_ptr(),
            tokens * top_k,
            out.data_ptr(),
            scratch.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def tiles_from(self, weight: CompiledWeight) -> int:
        """From how many rows of bfloat16 on :meth:`tile_product` is the fastest; 0: it does not take this weight."""
        return self.tiles_from_function(weight.address) if self.units > Units.TORCH else 0

    def tile_product(self, weight: CompiledWeight, inputs: Tensor) -> Tensor:
        """``inputs @ weight.T`` for many rows, which meet each part of the weight soon after it is decoded.

        Args:
            weight: One that :meth:`tiles_from` knows.
            inputs: bfloat16 [rows, in_features].

        Returns:
            bfloat16 [rows, out_features].
        """
        inputs = inputs.contiguous()
        out = torch.empty(len(inputs), weight.shape[0], dtype=torch.bfloat16)
        self.tile_product_function(
            weight.address, inputs.data_ptr(), len(inputs), out.data_ptr(), self.units, torch.get_num_threads()
        )
        return out

    def tile_experts(self, experts: CompiledExperts, inputs: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """As an :class:`qconv.runtime.backends.base.ExpertsOperator`, with SiLU, for many tokens.

        Args:
            experts: Of weights that :meth:`tiles_from` knows, all transposed or none.
            inputs: bfloat16 [tokens, hidden].
            chosen: int64 [tokens, top_k].
            weights: [tokens, top_k].

        Returns:
            float32 [tokens, hidden].
        """
        inputs, chosen, factor = inputs.contiguous(), chosen.contiguous(), weights.float().contiguous()
        tokens, top_k = chosen.shape
        out = torch.zeros(inputs.shape)
        self.tile_experts_function(
            *(ctypes.addressof(array) for array in experts.arrays),
            len(experts.weights),
            inputs.data_ptr(),
            chosen.data_ptr(),
            factor.data_ptr(),
            tokens,
            top_k,
            out.data_ptr(),
            self.units,
            torch.get_num_threads(),
        )
        return out


@dataclass(frozen=True, slots=True)
class CompiledWeight:
    """A packed weight that the library knows: its description points into the weight's own tensors."""

    weight: PackedWeight
    description: _Weight
    held: tuple[Tensor, ...]
    """What the description points at."""

    @property
    def address(self) -> int:
        """Of the description."""
        return ctypes.addressof(self.description)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.weight.shape

    @property
    def transposed(self) -> bool:
        """Whether the layout has inputs outermost."""
        return self.description.layout in (_AWQ, _GPTQ)

    def tensors(self) -> Iterator[Tensor]:
        """The tensors in memory."""
        return iter(self.held)


@dataclass(frozen=True, slots=True)
class CompiledExperts:
    """All experts, and the descriptions of all gates, ups and downs, each in one array."""

    weights: Sequence[Sequence[CompiledWeight]]
    arrays: tuple[ctypes.Array[_Weight], ...]
    width: int

    @property
    def alike(self) -> bool:
        """Whether all weights are transposed, or none is."""
        return len({weight.transposed for mlp in self.weights for weight in mlp}) == 1

    def gate_and_up(self, expert: int) -> Sequence[CompiledWeight]:
        """Of one expert."""
        return self.weights[expert][:2]

    @classmethod
    def of(cls, experts: Sequence[Sequence[CompiledWeight]]) -> CompiledExperts:
        """From each expert's gate, up and down."""
        kinds = zip(*experts, strict=True)
        arrays = tuple((_Weight * len(experts))(*(one.description for one in kind)) for kind in kinds)
        return cls(experts, arrays, experts[0][0].shape[0])


def describe(weight: PackedWeight) -> CompiledWeight | None:
    """The weight as the library takes it; None if it has no code for it.

    Raises:
        CheckpointError: the weight's tensors contradict each other.
    """
    match weight:
        case IntegerWeight():
            return _integer(weight)
        case FloatWeight():
            return _float(weight)
        case BlockWeight() if weight.type in _BLOCK_LAYOUTS:
            rows = weight.rows.contiguous()
            columns = weight.shape[1]
            return _described(weight, _BLOCK_LAYOUTS[weight.type], 0, columns, codes=rows)
        case BlockWeight() | DenseWeight():
            return None


def _integer(weight: IntegerWeight) -> CompiledWeight | None:
    grid, parts = weight.grid, {name: part.contiguous() for name, part in weight.parts.items()}
    if grid.bits not in (2, 4, 8) or (weight.format == "awq" and grid.bits != 4):
        return None
    group = weight.shape[1] if grid.group_size == CHANNEL else grid.group_size
    layout = _INTEGER_LAYOUTS.get(weight.format)
    if layout is None:
        return None
    if weight.format == "w4a16":
        if grid.act_order or (grid.bits == 4 and group % 8):
            return None
        zeros = parts.get("weight_zero_point")
        codes, scales = parts["weight_packed"], parts["weight_scale"]
        return _described(weight, layout, grid.bits, group, codes=codes, scales=scales, zeros=zeros)
    codes, scales = parts["qweight"], parts["scales"]
    if weight.format == "awq":
        return _described(weight, layout, 4, group, codes=codes, scales=scales, zeros=parts["qzeros"])
    gptq.check(weight.name, parts, grid)
    # qconv's own files hold the zero point less one where it is symmetric, and itself where it is not.
    offset = 1 if grid.symmetric != isinstance(grid, gptq.ForeignGrid) else 0
    return _described(
        weight,
        layout,
        grid.bits,
        group,
        codes=codes,
        scales=scales,
        zeros=None if grid.symmetric else parts["qzeros"],
        group_index=parts["g_idx"] if grid.act_order else None,
        zero_offset=offset,
    )


def _float(weight: FloatWeight) -> CompiledWeight:
    (rows, columns), held = weight.shape, as_e4m3(weight.weight)
    grid = held.grid
    group = columns if grid.group_size == CHANNEL else grid.group_size
    codes, scales = held.codes.contiguous(), held.scales.contiguous()
    return _described(weight, _E4M3, 8, group, codes=codes, scales=scales, block_rows=grid.rows_sharing(rows))


def _described(
    weight: PackedWeight,
    layout: int,
    bits: int,
    group: int,
    *,
    codes: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    group_index: Tensor | None = None,
    block_rows: int = 1,
    zero_offset: int = 0,
) -> CompiledWeight:
    rows, columns = weight.shape
    tensors = (codes, scales, zeros, group_index)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    dtype = 0 if scales is None else native.DTYPES[scales.dtype]
    description = _Weight(layout, bits, rows, columns, group, block_rows, dtype, zero_offset, *pointers)
    return CompiledWeight(weight, description, tuple(tensor for tensor in tensors if tensor is not None))
