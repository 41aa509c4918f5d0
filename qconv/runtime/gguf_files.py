"""A GGUF model as the checkpoint that it was made from: names, order of rows and experts as transformers has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from qconv.checkpoint.header import TensorEntry
from qconv.checkpoint.maps import MapTensor
from qconv.checkpoint.reader import Tensors, map_tensor
from qconv.errors import CheckpointError
from qconv.gguf.config import config_of
from qconv.gguf.header import GgufEntry
from qconv.gguf.names import GgufTensor, gguf_tensors
from qconv.gguf.reader import GgufModel
from qconv.models import Architecture, architecture
from qconv.models.base import Linear
from qconv.runtime.packed import BlockWeight, DenseWeight, PackedWeight, dequantized_rows, row_bytes

_DENSE = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class GgufFiles:
    """A GGUF model.

    Attributes:
        model: Its files.
        config: A config.json made from its metadata.
        architecture: Its linears and norms.
        mapped: How tensors are mapped.
        places: Of each tensor of the checkpoint, the tensor that holds it and which of its equal parts it is.
    """

    model: GgufModel
    config: dict[str, Any]
    architecture: Architecture
    mapped: MapTensor
    places: dict[str, tuple[GgufTensor, int]] = field(repr=False)

    @classmethod
    def open(cls, path: Path, mapped: MapTensor = map_tensor) -> GgufFiles:
        """Open a model.

        Raises:
            CheckpointError: damaged, incomplete, or of an architecture that qconv does not know.
        """
        model = GgufModel.open(path)
        config = config_of(model)
        resolved = architecture(config)
        places = {
            source: (tensor, part) for tensor in gguf_tensors(resolved) for part, source in enumerate(tensor.sources)
        }
        return cls(model, config, resolved, mapped, places)

    @property
    def path(self) -> Path:
        """The first file."""
        return self.model.files[0]

    def weight(self, linear: Linear) -> PackedWeight:
        """Blocks as the file holds them, or a dense weight where it is not quantized."""
        shape = (linear.out_features, linear.in_features)
        rows, type = self._rows(linear.weight, shape)
        if type in _DENSE:
            return DenseWeight(linear.name, rows.view(_DENSE[type]))
        return BlockWeight(linear.name, shape, type, rows)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor's values, float32 unless the file has them in 16 bits."""
        rows, type = self._rows(name, (shape[0] if len(shape) > 1 else 1, shape[-1]), vector=len(shape) == 1)
        values = rows.view(_DENSE[type]) if type in _DENSE else dequantized_rows(rows, type)
        return values.view(shape)

    def bias(self, linear: Linear) -> Tensor | None:
        """The bias, where the architecture has one."""
        return self.tensor(f"{linear.name}.bias", (linear.out_features,)) if linear.bias else None

    def rows(self, linear: Linear, start: int, stop: int) -> PackedWeight:
        """Rows of the embedding or the head, which are never permuted."""
        entry = self._entry(linear.weight, (linear.out_features, linear.in_features))
        size = row_bytes(entry.type, linear.in_features)
        rows = self.mapped(_bytes(entry, start, stop - start, size))
        if entry.type in _DENSE:
            return DenseWeight(linear.name, rows.view(_DENSE[entry.type]))
        return BlockWeight(linear.name, (stop - start, linear.in_features), entry.type, rows)

    def gather(self, linear: Linear, ids: Tensor) -> Tensor:
        """Rows of the embedding."""
        entry = self._entry(linear.weight, (linear.out_features, linear.in_features))
        whole = _bytes(entry, 0, linear.out_features, row_bytes(entry.type, linear.in_features))
        rows = Tensors({entry.name: whole}).gather(entry.name, ids)
        return rows.view(_DENSE[entry.type]) if entry.type in _DENSE else dequantized_rows(rows, entry.type)

    def inverse_frequency_divisors(self) -> Tensor | None:
        """``rope_freqs.weight``, in which Llama 3.1's scaling is stated."""
        if _ROPE_FACTORS not in self.model.entries:
            return None
        entry = self.model.entry(_ROPE_FACTORS)
        count = self.architecture.head_dim // 2
        if entry.type is not GGMLQuantizationType.F32 or entry.numel != count:
            raise _misshapen(entry, (count,))
        return self.mapped(_bytes(entry, 0, 1, entry.nbytes)).view(torch.float32).view(count)

    def _rows(self, name: str, shape: tuple[int, int], *, vector: bool = False) -> tuple[Tensor, GGMLQuantizationType]:
        """A tensor of the checkpoint as rows of bytes, uint8 [rows, bytes], with their type."""
        tensor, part = self.places[name]
        entry, (rows, columns) = self._entry(name, shape), shape
        size = row_bytes(entry.type, columns)
        found = self.mapped(_bytes(entry, part * rows, rows, size))
        if tensor.heads:
            # A vector's elements are what a matrix's rows are.
            found = original_heads(found.view(-1, 4) if vector else found, tensor.heads).view(found.shape)
        return found, entry.type

    def _entry(self, name: str, shape: tuple[int, int]) -> GgufEntry:
        """The tensor of the file that holds one of the checkpoint's."""
        tensor, _ = self.places[name]
        entry = self.model.entry(tensor.name)
        rows, columns = shape
        if entry.shape[-1] != columns or entry.numel != rows * columns * len(tensor.sources):
            raise _misshapen(entry, tensor.shape)
        return entry


def original_heads(rows: Tensor, heads: int) -> Tensor:
    """Undo :func:`qconv.gguf.names.permute_heads`: rows of q or k in transformers' rotary layout, a copy."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def _bytes(entry: GgufEntry, row: int, rows: int, size: int) -> TensorEntry:
    """Some rows' bytes."""
    return TensorEntry(entry.name, torch.uint8, (rows, size), entry.file, entry.offset + row * size, rows * size)


def _misshapen(entry: GgufEntry, shape: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"{entry.file}: tensor {entry.name!r} is {entry.type.name} {list(entry.shape)}, the file's keys imply "
        f"{list(shape)}.",
        hint="The file is damaged, or of another kind.",
    )
