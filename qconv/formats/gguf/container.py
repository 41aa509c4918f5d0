"""GGUF files written as a stream, one or a set of splits.

A file is: a fixed header, key/values, the tensors' names, shapes, types and offsets, and the tensors' bytes, each
padded to :data:`ALIGNMENT`. Everything before the tensors is known before the first of them is read, so a tensor of 160
experts is written expert by expert and never held. The ``gguf`` package encodes the header.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValue,
    GGUFValueType,
    GGUFWriter,
    Keys,
)
from gguf.gguf_writer import SHARD_NAME_FORMAT, WriterState
from torch import Tensor

from qconv.checkpoint.writer import StagedFile
from qconv.errors import UsageError
from qconv.formats.gguf.metadata import Metadata

ALIGNMENT = GGUF_DEFAULT_ALIGNMENT
"""Bytes to which a tensor's data is padded."""

MAX_NAME_BYTES = 63
"""llama.cpp holds a tensor's name in 64 bytes with a closing zero."""
MAX_SPLITS = 65535  # split.count is 16 bits wide


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of a tensor; ``shape`` is outermost first, the file states it reversed."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes, padding not counted."""
        elements, size = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // elements * size

    @property
    def padded(self) -> int:
        """Size in the file."""
        return self.nbytes + -self.nbytes % ALIGNMENT


def encode_header(metadata: Metadata, tensors: Sequence[TensorInfo]) -> bytes:
    """Everything before the first tensor's bytes.

    Raises:
        UsageError: a name is too long for llama.cpp, or a row is no whole number of blocks.
    """
    writer = GGUFWriter(None, "")
    writer.kv_data[0].update(metadata)
    for tensor in tensors:
        if len(tensor.name.encode()) > MAX_NAME_BYTES:
            raise UsageError(f"{tensor.name}: llama.cpp holds names of at most {MAX_NAME_BYTES} bytes.")
        elements = GGML_QUANT_SIZES[tensor.type][0]
        if tensor.shape[-1] % elements:
            raise UsageError(
                f"{tensor.name}: {tensor.type.name} holds blocks of {elements} weights, which do not divide rows of "
                f"{tensor.shape[-1]}."
            )
        # The dtype is overridden by the type; only uint8 would make the writer take the shape for bytes.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=tensor.type)
    header = io.BytesIO()
    writer.fout = [cast(io.BufferedWriter, header)]
    writer.state = WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return header.getvalue() + bytes(-header.tell() % ALIGNMENT)


@dataclass(frozen=True)
class FileLayout:
    """One GGUF file before it is written: its name, key/values and tensors in file order."""

    name: str
    metadata: Metadata
    tensors: tuple[TensorInfo, ...]

    @functools.cached_property
    def header(self) -> bytes:
        """As :func:`encode_header`, which takes seconds for a large vocabulary."""
        return encode_header(self.metadata, self.tensors)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(tensor.padded for tensor in self.tensors)


def lay_out(stem: str, metadata: Metadata, tensors: Sequence[TensorInfo], max_split_size: int) -> list[FileLayout]:
    """Distribute tensors over files: ``STEM.gguf``, or ``STEM-00001-of-0000N.gguf`` and so on.

    Args:
        stem: The name without suffix.
        metadata: The model's key/values, all of which go to the first file.
        tensors: In file order, which splits keep.
        max_split_size: Bytes of tensors that a file may hold; a larger tensor gets a file of its own.

    Raises:
        UsageError: more files than a set may have.
    """
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.padded > max_split_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.padded
    if len(shards) == 1:
        return [FileLayout(f"{stem}.gguf", metadata, tuple(tensors))]
    if len(shards) > MAX_SPLITS:
        raise UsageError(
            f"files of {max_split_size} bytes: {len(shards)} of them, a set has at most {MAX_SPLITS}.",
            hint="Allow larger files.",
        )
    layouts = []
    for number, shard in enumerate(shards):
        keys = _split_keys(number, len(shards), len(tensors))
        layouts.append(
            FileLayout(
                SHARD_NAME_FORMAT.format(stem, number + 1, len(shards)),
                metadata | keys if number == 0 else keys,
                tuple(shard),
            )
        )
    return layouts


def _split_keys(number: int, count: int, tensors: int) -> Metadata:
    return {
        Keys.Split.LLM_KV_SPLIT_NO: GGUFValue(number, GGUFValueType.UINT16),
        Keys.Split.LLM_KV_SPLIT_COUNT: GGUFValue(count, GGUFValueType.UINT16),
        Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT: GGUFValue(tensors, GGUFValueType.INT32),
    }


class GgufWriter(StagedFile):
    """Writes the tensors of a layout, in that order."""

    def __init__(self, folder: Path, layout: FileLayout, temporary: Path | None = None) -> None:
        """Open the temporary file, as :class:`StagedFile` does, and write the header.

        Raises:
            OutputError: the file cannot be created or the disk is full.
            UsageError: as :func:`encode_header`.
        """
        self._tensors = layout.tensors
        self._next = 0
        super().__init__(folder / layout.name, layout.header, temporary)

    @property
    def missing(self) -> int:
        """Tensors that were not written yet."""
        return len(self._tensors) - self._next

    def write_blocks(self, name: str, blocks: Iterable[Tensor]) -> None:
        """Append the next tensor, given as the consecutive bytes of its rows.

        Args:
            name: The tensor's.
            blocks: uint8, any shape.

        Raises:
            ValueError: not the tensor that comes next, not bytes, or too few or too many of them.
            OutputError: the disk is full or the file cannot be written.
        """
        if self.complete:
            raise ValueError(f"{name}: the file is complete")
        tensor = self._tensors[self._next]
        if name != tensor.name:
            raise ValueError(f"expected {tensor.name}, got {name}")
        nbytes = 0
        for block in blocks:
            if block.dtype != torch.uint8:
                raise ValueError(f"{name}: {block.dtype}, not bytes")
            nbytes += block.nbytes
            if block.numel():
                self._append(block.contiguous().reshape(-1).numpy().data)
        if nbytes != tensor.nbytes:
            raise ValueError(f"{name}: {nbytes} bytes, not {tensor.nbytes}")
        self._append(bytes(tensor.padded - tensor.nbytes))
        self._next += 1
