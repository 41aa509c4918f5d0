"""A GGUF model as the checkpoint that it was made from: names, order of rows and experts as transformers has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_TENSOR, GGMLQuantizationType
from torch import Tensor

from qconv.checkpoint.header import TensorEntry
from qconv.checkpoint.maps import MapTensor
from qconv.checkpoint.reader import Tensors, map_tensor
from qconv.core.architecture import Architecture, Linear
from qconv.errors import CheckpointError
from qconv.formats.gguf.config import config_of, predicting_layers
from qconv.formats.gguf.forms import form
from qconv.formats.gguf.header import GgufEntry
from qconv.formats.gguf.keys import ModelKeys
from qconv.formats.gguf.names import GgufTensor, gguf_tensors
from qconv.formats.gguf.reader import GgufModel
from qconv.models import architecture
from qconv.runtime.activations import InputRounding
from qconv.runtime.packed import BlockWeight, DenseWeight, PackedWeight, dequantized_rows, is_decoded, row_bytes

_DENSE = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_REQUIRED = (MODEL_TENSOR.FFN_EXP_PROBS_B, MODEL_TENSOR.SSM_DT)
"""Biases that are no linear's."""
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
        changed: Of those that are held otherwise, the tensors that they are made of.
    """

    model: GgufModel
    config: dict[str, Any]
    architecture: Architecture
    mapped: MapTensor
    places: dict[str, tuple[GgufTensor, int]] = field(repr=False)
    changed: dict[str, list[GgufTensor]] = field(repr=False)

    @classmethod
    def open(cls, path: Path, mapped: MapTensor = map_tensor, config: dict[str, Any] | None = None) -> GgufFiles:
        """Open a model.

        Args:
            path: A GGUF file, any of a set, or a folder that holds one model.
            mapped: How tensors are mapped.
            config: The config.json of the model that it was made from; None to make one from the keys.

        Raises:
            CheckpointError: damaged, incomplete, of an architecture that qconv does not know, or with a tensor or key
                that qconv does not compute with.
        """
        model = GgufModel.open(path)
        config = config_of(model) if config is None else config
        resolved = architecture(config)
        tensors = gguf_tensors(resolved, present=model.entries)
        _check_tensors(model, tensors, _left_out(model, resolved))
        places = {source: (tensor, part) for tensor in tensors for part, source in enumerate(tensor.sources)}
        changed: dict[str, list[GgufTensor]] = {}
        for tensor in tensors:
            if not tensor.in_rows:
                changed.setdefault(tensor.sources[0], []).append(tensor)
        return cls(model, config, resolved, mapped, places, changed)

    @property
    def path(self) -> Path:
        """The first file."""
        return self.model.files[0]

    def weight(self, linear: Linear) -> PackedWeight:
        """Blocks as the file holds them, or a dense weight where it is not quantized."""
        shape = (linear.out_features, linear.in_features)
        if linear.weight in self.changed:
            return DenseWeight(linear.name, self._joined(linear.weight, shape))
        rows, type = self._rows(linear.weight, shape)
        if type in _DENSE:
            return DenseWeight(linear.name, rows.view(_DENSE[type]))
        return BlockWeight(linear.name, shape, type, rows, self.scale_of(linear.weight))

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor's values, float32 unless the file has them in 16 bits."""
        if name in self.changed:
            return self._joined(name, shape)
        rows, type = self._rows(name, (shape[0] if len(shape) > 1 else 1, shape[-1]), vector=len(shape) == 1)
        return _values(rows, type, self.scale_of(name)).view(shape)

    def _joined(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of the checkpoint of those that the file holds instead, float32."""
        pieces = []
        for tensor in self.changed[name]:
            entry = self.model.entry(tensor.name)
            whole = self.mapped(_bytes(entry, 0, tensor.rows, row_bytes(entry.type, tensor.columns)))
            pieces.append(_values(whole, entry.type).float().view(tensor.shape))
        change = self.changed[name][0].change
        assert change is not None
        return change.join(*pieces).reshape(shape).contiguous()

    def coded(self, name: str, shape: tuple[int, int]) -> tuple[Tensor, GGMLQuantizationType] | None:
        """A matrix as rows of bytes, uint8 [rows, bytes], with their type; None of one that is held otherwise.

        The rows are the checkpoint's, in its order.
        """
        return None if name in self.changed else self._rows(name, shape)

    def type_of(self, name: str) -> GGMLQuantizationType:
        """The type of a tensor of the checkpoint; of one that is held in several, the first one's."""
        tensor = self.changed[name][0] if name in self.changed else self.places[name][0]
        return self.model.entry(tensor.name).type

    def scale_of(self, name: str) -> float:
        """What a tensor of the checkpoint is multiplied by beside its blocks: NVFP4's global scale, else 1."""
        if name in self.changed:
            return 1.0
        tensor, part = self.places[name]
        scales = self.model.scales_of(tensor.name)
        return 1.0 if scales is None else scales[part if len(scales) > 1 else 0]

    def is_in_order(self, name: str) -> bool:
        """Whether the file has a tensor's rows as the checkpoint has them."""
        return name not in self.changed and not self.places[name][0].heads and self.places[name][0].moved is None

    def values(self, name: str, shape: tuple[int, int], start: int, stop: int) -> Tensor:
        """Some rows of a matrix that lies in order, float32 unless the file has them in 16 bits."""
        tensor, part = self.places[name]
        entry, size = self.model.entry(tensor.name), row_bytes(self.model.entry(tensor.name).type, shape[1])
        rows = self.mapped(_bytes(entry, part * shape[0] + start, stop - start, size))
        return _values(rows, entry.type, self.scale_of(name))

    def stored(self, name: str, shape: tuple[int, ...]) -> list[TensorEntry]:
        """The bytes of the file that a tensor of the checkpoint is made of."""
        if name in self.changed:
            whole = [self.model.entry(tensor.name) for tensor in self.changed[name]]
            return [
                TensorEntry(one.name, torch.uint8, (one.nbytes,), one.file, one.offset, one.nbytes) for one in whole
            ]
        tensor, part = self.places[name]
        rows = shape[0] if len(shape) > 1 else 1
        return [_bytes(self.model.entry(tensor.name), part * rows, rows, row_bytes(self.type_of(name), shape[-1]))]

    def bias(self, linear: Linear) -> Tensor | None:
        """The bias, where the file has one: llama.cpp adds those that there are, of q alone too."""
        name = f"{linear.name}.bias"
        if name not in self.places or self.places[name][0].name not in self.model.entries:
            return None
        return self.tensor(name, (linear.out_features,))

    def rows(self, linear: Linear, start: int, stop: int) -> PackedWeight:
        """Rows of the embedding or the head, which are never permuted."""
        entry = self._entry(linear.weight, (linear.out_features, linear.in_features))
        size = row_bytes(entry.type, linear.in_features)
        rows = self.mapped(_bytes(entry, start, stop - start, size))
        if entry.type in _DENSE:
            return DenseWeight(linear.name, rows.view(_DENSE[entry.type]))
        return BlockWeight(
            linear.name, (stop - start, linear.in_features), entry.type, rows, self.scale_of(linear.weight)
        )

    def gather(self, linear: Linear, ids: Tensor) -> Tensor:
        """Rows of the embedding."""
        entry = self._entry(linear.weight, (linear.out_features, linear.in_features))
        whole = _bytes(entry, 0, linear.out_features, row_bytes(entry.type, linear.in_features))
        rows = Tensors({entry.name: whole}).gather(entry.name, ids)
        return _values(rows, entry.type, self.scale_of(linear.weight))

    def input_rounding(self, linear: Linear) -> InputRounding | None:
        """None: how llama.cpp rounds inputs depends on the machine."""
        return None

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
        if tensor.moved is not None and tensor.moved.rows is not None:
            found = found[tensor.moved.rows.argsort()]
        elif tensor.heads:
            # A vector's elements are what a matrix's rows are.
            found = original_heads(found.view(-1, 4) if vector else found, tensor.heads).view(found.shape)
        return found, entry.type

    def _entry(self, name: str, shape: tuple[int, int]) -> GgufEntry:
        """The tensor of the file that holds one of the checkpoint's."""
        tensor, _ = self.places[name]
        return self.model.entry(tensor.name)


def _left_out(model: GgufModel, resolved: Architecture) -> set[str]:
    """The tensors that are not the checkpoint's: rotary factors, and layers that only predict further tokens."""
    of = form(resolved.family)
    layers = len(resolved.layers)
    behind = range(layers, layers + predicting_layers(ModelKeys.of(model.files[0], model.metadata), of))
    prefixes = tuple(f"blk.{layer}." for layer in behind)
    left = {name for name in model.entries if name.startswith(prefixes)} if prefixes else set()
    return left | ({_ROPE_FACTORS} if of.rope_factors else set())


def _check_tensors(model: GgufModel, expected: Sequence[GgufTensor], left_out: set[str]) -> None:
    """Check that the file holds the tensors of the architecture, of its shapes, and none that is not known.

    Raises:
        CheckpointError: a weight or norm is missing, a tensor is misshapen, or one is there that is not used.
    """
    for tensor in expected:
        if tensor.name not in model.entries and tensor.name.endswith(".bias") and tensor.kind not in _REQUIRED:
            continue
        entry = model.entry(tensor.name)
        if entry.shape[-1] != tensor.columns or entry.numel != tensor.numel:
            raise _misshapen(entry, tensor.shape)
        if entry.type is GGMLQuantizationType.NVFP4 and not tensor.in_rows and model.scales_of(tensor.name):
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name!r} is NVFP4 with a scale, in rows that are not the checkpoint's.",
                hint="Run it with llama.cpp.",
            )
        scales = model.scales_of(tensor.name)
        if scales is not None and len(scales) not in (1, len(tensor.sources)):
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name!r} has {len(scales)} scales for {len(tensor.sources)} parts.",
                hint="The file is damaged, or of another kind.",
            )
        if entry.type not in _DENSE and not is_decoded(entry.type):
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name!r} is {entry.type.name}, which qconv does not read.",
                hint="Quantize the original model again, or run it with llama.cpp.",
            )
    beside = {name for tensor in expected for name in model.beside(tensor.name)}
    unused = sorted(model.entries.keys() - {tensor.name for tensor in expected} - left_out - beside)
    if unused:
        others = f" and {len(unused) - 1} others" if len(unused) > 1 else ""
        raise CheckpointError(
            f"{model.entries[unused[0]].file}: tensor {unused[0]!r}{others}: qconv computes nothing with it.",
            hint="llama.cpp may. qconv runs no model in part: its logits would be others.",
        )


def original_heads(rows: Tensor, heads: int) -> Tensor:
    """Undo :func:`qconv.formats.gguf.names.permute_heads`: rows of q or k in transformers' rotary layout, a copy."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def _bytes(entry: GgufEntry, row: int, rows: int, size: int) -> TensorEntry:
    """Some rows' bytes."""
    return TensorEntry(entry.name, torch.uint8, (rows, size), entry.file, entry.offset + row * size, rows * size)


def _values(rows: Tensor, type: GGMLQuantizationType, scale: float = 1.0) -> Tensor:
    """Rows of bytes as values: as they are where they have 16 or 32 bits, else dequantized to float32."""
    return rows.view(_DENSE[type]) if type in _DENSE else dequantized_rows(rows, type, scale)


def _misshapen(entry: GgufEntry, shape: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"{entry.file}: tensor {entry.name!r} is {entry.type.name} {list(entry.shape)}, the file's keys imply "
        f"{list(shape)}.",
        hint="The file is damaged, or of another kind.",
    )
