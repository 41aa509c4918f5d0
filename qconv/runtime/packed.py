"""Weights as their files hold them: what a backend is given.

None of these classes computes fast. Each can say what it stands for (``dequantize``), which is the reference that every
backend is held against; a backend looks at the class and its fields and takes the tensors as they are, mapped from the
file where the file allows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from qconv.core.qtensor import Grid, QTensor
from qconv.formats import get_format
from qconv.grids.ggml.whole import from_blocks


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """A weight that is not quantized.

    Attributes:
        name: The linear's name in the checkpoint.
        weight: [out_features, in_features], any float dtype.
    """

    name: str
    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.weight.shape[0], self.weight.shape[1]

    def tensors(self) -> Iterator[Tensor]:
        """The tensors in memory."""
        yield self.weight

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight, [out_features, in_features]."""
        return self.weight.to(dtype)


@dataclass(frozen=True, slots=True)
class IntegerWeight:
    """Integer codes packed into words: AWQ, GPTQ or compressed-tensors.

    Attributes:
        name: The linear's name in the checkpoint.
        shape: (out_features, in_features).
        format: ``awq``, ``gptq`` or ``w4a16``: the module of qconv.formats that describes the layout.
        grid: Bits, groups, symmetry, act-order. A ``gptq`` grid is a ``ForeignGrid`` where zero points are stored the
            other way than qconv writes them.
        parts: The file's tensors by the last part of their names: ``qweight``, ``qzeros``, ``scales`` ...; of the
            shapes and dtypes that the format states.
    """

    name: str
    shape: tuple[int, int]
    format: str
    grid: Grid
    parts: Mapping[str, Tensor]

    def tensors(self) -> Iterator[Tensor]:
        """The tensors in memory."""
        yield from self.parts.values()

    def unpack(self) -> QTensor:
        """Codes, scales and zero points one by one.

        Raises:
            CheckpointError: the tensors contradict the grid.
        """
        prefix = f"{self.name}."
        return get_format(self.format).unpack(
            self.name, self.shape, lambda name: self.parts[name.removeprefix(prefix)], self.grid
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight that the codes stand for, computed in float32, [out_features, in_features]."""
        return self.unpack().dequantize(dtype)


@dataclass(frozen=True, slots=True)
class FloatWeight:
    """Codes that are floats, with scales by group, block, row or tensor.

    Attributes:
        name: The linear's name in the checkpoint.
        weight: The codes are float8_e4m3fn [out_features, in_features], as in the file, or E2M1, one in a byte; scales
            [blocks down, blocks across] in their stored dtype, for blocks of ``grid.block_rows`` times
            ``grid.group_size``.
    """

    name: str
    weight: QTensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.weight.shape

    def tensors(self) -> Iterator[Tensor]:
        """The tensors in memory."""
        yield self.weight.codes
        yield self.weight.scales

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight that the codes stand for, computed in float32, [out_features, in_features]."""
        return self.weight.dequantize(dtype)


@dataclass(frozen=True, slots=True)
class BlockWeight:
    """Rows of ggml's blocks, from a GGUF file.

    Attributes:
        name: The linear's name in the checkpoint that the file was made from.
        shape: (out_features, in_features).
        type: ggml's type of the blocks.
        rows: uint8 [out_features, bytes of a row], in transformers' order of rows.
        scale: What all of it is multiplied by (NVFP4's global scale).
    """

    name: str
    shape: tuple[int, int]
    type: GGMLQuantizationType
    rows: Tensor
    scale: float = 1.0

    def tensors(self) -> Iterator[Tensor]:
        """The tensors in memory."""
        yield self.rows

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight that the blocks stand for, computed in float32, [out_features, in_features]."""
        return dequantized_rows(self.rows, self.type, self.scale).to(dtype)


PackedWeight: TypeAlias = DenseWeight | IntegerWeight | FloatWeight | BlockWeight


@dataclass(frozen=True, slots=True)
class PackedMlp:
    """One expert, ``down(act(gate(x)) * up(x))``."""

    gate: PackedWeight
    up: PackedWeight
    down: PackedWeight

    def weights(self) -> tuple[PackedWeight, PackedWeight, PackedWeight]:
        """gate, up, down."""
        return self.gate, self.up, self.down


def nbytes(weight: PackedWeight) -> int:
    """Bytes of a weight's tensors."""
    return sum(tensor.nbytes for tensor in weight.tensors())


def row_bytes(type: GGMLQuantizationType, columns: int) -> int:
    """Bytes of a row of ggml's blocks."""
    elements, size = GGML_QUANT_SIZES[type]
    return columns // elements * size


def is_decoded(type: GGMLQuantizationType) -> bool:
    """Whether the ``gguf`` package decodes blocks of a type: of those without a decoder it says so itself."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[type][1]), dtype=np.uint8), type)
    except NotImplementedError:
        return False
    return True


def dequantized_rows(rows: Tensor, type: GGMLQuantizationType, scale: float = 1.0) -> Tensor:
    """Rows of ggml's blocks as float32 [rows, columns], by the ``gguf`` package's own code.

    Args:
        rows: uint8 [rows, bytes].
        type: Of the blocks.
        scale: NVFP4's global scale. A weight is then the code times the float32 of both scales, as in other layouts.
    """
    if scale != 1.0 and type is GGMLQuantizationType.NVFP4:
        found = from_blocks(rows, type, global_scale=scale)
        if isinstance(found, QTensor):
            return found.dequantize()
    values = torch.from_numpy(dequantize(rows.numpy(force=True), type).copy()).to(rows.device)
    return values if scale == 1.0 else values.mul_(scale)
