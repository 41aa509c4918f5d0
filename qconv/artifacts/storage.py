"""How a source's weights are stored, by its config.json: densely, or quantized in a way that reads as dense weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from qconv.artifacts.coded import StoredCodes
from qconv.artifacts.dtypes import weight_dtype
from qconv.artifacts.layout import quantization_section
from qconv.artifacts.mlx_view import is_mlx
from qconv.artifacts.packed import CODES, LEAVES, PackedCheckpoint, packed_integers
from qconv.checkpoint import mxfp4
from qconv.checkpoint.config import quantization_of
from qconv.checkpoint.fp8 import ACTIVATION_LEAVES, SCALE_LEAVES, Dequantized, Fp8Scheme
from qconv.checkpoint.header import DTYPE_NAMES
from qconv.checkpoint.mxfp4 import Mxfp4Checkpoint
from qconv.checkpoint.quantized import QuantizedCheckpoint
from qconv.checkpoint.reader import Checkpoint
from qconv.core.qtensor import CHANNEL
from qconv.errors import CheckpointError, UnreadLayoutError
from qconv.formats import detect, formats
from qconv.formats.auto_round import in_their_words
from qconv.formats.base import Described

_LARGE = (4096, 4096)


class Storage(Protocol):
    """A way to store weights quantized."""

    @property
    def name(self) -> str:
        """What codes are called in a table of dtypes."""

    @property
    def said(self) -> str:
        """What config.json says that weights are."""

    @property
    def marks(self) -> tuple[str, ...]:
        """Leaf names of which each tells that the weight beside it is quantized."""

    @property
    def leaves(self) -> tuple[str, ...]:
        """Leaf names of what may stand beside a quantized weight, or for it."""

    def codes(self, weight: str) -> str:
        """What the codes of a weight are called, by its name."""

    def nbytes(self, shape: tuple[int, ...], weight: str = "") -> int:
        """About how many bytes a weight of a shape takes, with its scales; of a name where grids go by names."""

    def read(self, stored: Checkpoint, dtype: torch.dtype) -> QuantizedCheckpoint:
        """The dense view of a checkpoint.

        Raises:
            CheckpointError: what is stored does not fit together.
        """


@dataclass(frozen=True, slots=True)
class StoredFp8:
    """E4M3 numbers with scales."""

    scheme: Fp8Scheme
    name: str = DTYPE_NAMES[torch.float8_e4m3fn]
    said: str = "FP8"
    marks: tuple[str, ...] = SCALE_LEAVES
    leaves: tuple[str, ...] = (*SCALE_LEAVES, *ACTIVATION_LEAVES)

    def codes(self, weight: str) -> str:
        """As the weight is."""
        return weight

    def nbytes(self, shape: tuple[int, ...], weight: str = "") -> int:
        """Scales are float32 at most."""
        return math.prod(shape) + math.prod(self.scheme.scale_shape(shape)) * torch.float32.itemsize

    def read(self, stored: Checkpoint, dtype: torch.dtype) -> Dequantized:
        """See :class:`qconv.checkpoint.fp8.Dequantized`."""
        return Dequantized.of(stored, self.scheme, dtype)


@dataclass(frozen=True, slots=True)
class StoredIntegers:
    """Packed integers of compressed-tensors."""

    described: Described
    said: str = "packed integers"
    marks: tuple[str, ...] = (CODES,)
    leaves: tuple[str, ...] = (*LEAVES, *ACTIVATION_LEAVES)

    def codes(self, weight: str) -> str:
        """Another name than the weight's."""
        return f"{weight.removesuffix('weight')}{CODES}"

    @property
    def name(self) -> str:
        """Bits of the first grid."""
        return f"INT{self.described.grid.bits}"

    def nbytes(self, shape: tuple[int, ...], weight: str = "") -> int:
        """On the first grid; scales of two bytes."""
        grid = self.described.grid
        groups = 1 if grid.group_size == CHANNEL else -(-shape[-1] // grid.group_size)
        rows = math.prod(shape[:-1])
        zero_points = 0 if grid.symmetric else rows * groups * grid.bits // 8
        return rows * shape[-1] * grid.bits // 8 + 2 * rows * groups + zero_points + 16

    def read(self, stored: Checkpoint, dtype: torch.dtype) -> PackedCheckpoint:
        """See :class:`qconv.artifacts.packed.PackedCheckpoint`."""
        return PackedCheckpoint.of(stored, self.described, dtype)


@dataclass(frozen=True, slots=True)
class StoredMxfp4:
    """gpt-oss's MXFP4."""

    name: str = "MXFP4"
    said: str = "MXFP4"
    marks: tuple[str, ...] = (mxfp4.BLOCKS,)
    leaves: tuple[str, ...] = (mxfp4.BLOCKS, mxfp4.SCALES)

    def codes(self, weight: str) -> str:
        """Another name than the weight's."""
        return f"{weight.removesuffix('weight')}{mxfp4.BLOCKS}"

    def nbytes(self, shape: tuple[int, ...], weight: str = "") -> int:
        """17 bytes for 32 elements."""
        return math.prod(shape) * 17 // mxfp4.BLOCK

    def read(self, stored: Checkpoint, dtype: torch.dtype) -> Mxfp4Checkpoint:
        """See :class:`qconv.checkpoint.mxfp4.Mxfp4Checkpoint`."""
        return Mxfp4Checkpoint.of(stored, dtype)


def bytes_a_weight(storage: Storage) -> float:
    """About how many bytes one weight of a large matrix takes, with its share of the scales."""
    return storage.nbytes(_LARGE) / math.prod(_LARGE)


def storage_of(path: Path, config: dict[str, Any]) -> Storage | None:
    """How a config.json says that weights are stored; None for an unquantized model.

    Raises:
        CheckpointError: quantized in any other way.
    """
    section = quantization_section(path, config) if is_mlx(config) else quantization_of(config)
    if section is None:
        return None
    method, problem = None, ""
    if isinstance(section, dict):
        method = section.get("quant_method")
        try:
            return _read_storage(in_their_words(section), weight_dtype(path, config))
        except UnreadLayoutError as error:
            problem = f": {error.message}"
    raise CheckpointError(
        f"{path}: already quantized (quant_method {method!r}){problem.rstrip('.')}.",
        hint=f"Give the unquantized checkpoint, or one in a layout that is read: {', '.join(formats())}.",
    )


def _read_storage(section: dict[str, Any], dtype: torch.dtype) -> Storage:
    """What a ``quantization_config`` says.

    Raises:
        UnreadLayoutError: nothing that is read.
        CheckpointError: FP8 or packed integers of a kind that is not; names the key.
    """
    found = detect({"quantization_config": section})
    if section.get("quant_method") == mxfp4.METHOD:
        return StoredMxfp4()
    problem: CheckpointError | None = None
    try:
        scheme = Fp8Scheme.parse(section)
        if scheme is not None:
            return StoredFp8(scheme)
        described = packed_integers(section, dtype)
        if described is not None:
            return StoredIntegers(described)
    except CheckpointError as error:  # floats of another kind, or of several at once, may be a format's
        problem = error
    try:
        if found is not None:
            return StoredCodes(found, found.read_config(section, dtype))
    except CheckpointError as error:
        raise problem or UnreadLayoutError(error.message, hint=error.hint) from error
    raise problem or UnreadLayoutError("of no layout that is read.")
