"""How a source's weights are stored, by its config.json: densely, or quantized in a way that reads as dense weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from qconv.artifacts.packed import CODES, LEAVES, PackedCheckpoint, packed_integers
from qconv.checkpoint import mxfp4
from qconv.checkpoint.config import quantization_of
from qconv.checkpoint.fp8 import ACTIVATION_LEAVES, SCALE_LEAVES, Dequantized, Fp8Scheme
from qconv.checkpoint.header import DTYPE_NAMES
from qconv.checkpoint.mxfp4 import Mxfp4Checkpoint
from qconv.checkpoint.quantized import QuantizedCheckpoint
from qconv.checkpoint.reader import Checkpoint
from qconv.core.qtensor import CHANNEL
from qconv.errors import CheckpointError
from qconv.formats.base import Described

_LARGE = (4096, 4096)
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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

    @property
    def in_place(self) -> bool:
        """Whether codes are called as the weight is."""

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """About how many bytes a weight of a shape takes, with its scales."""

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
    in_place: bool = True

    def nbytes(self, shape: tuple[int, ...]) -> int:
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
    in_place: bool = False

    @property
    def name(self) -> str:
        """Bits of the first grid."""
        return f"INT{self.described.grid.bits}"

    def nbytes(self, shape: tuple[int, ...]) -> int:
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
    in_place: bool = False

    def nbytes(self, shape: tuple[int, ...]) -> int:
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
    section = quantization_of(config)
    if section is None:
        return None
    method = section.get("quant_method") if isinstance(section, dict) else None
    if isinstance(section, dict):
        scheme = Fp8Scheme.parse(section)
        if scheme is not None:
            return StoredFp8(scheme)
        if method == mxfp4.METHOD:
            return StoredMxfp4()
        described = packed_integers(section, weight_dtype(path, config))
        if described is not None:
            return StoredIntegers(described)
    raise CheckpointError(
        f"{path}: already quantized (quant_method {method!r}).",
        hint="Give the unquantized checkpoint, or one in FP8, MXFP4 or packed integers of compressed-tensors; "
        "qconv convert --to bf16 makes one of any build that it reads.",
    )


def weight_dtype(path: Path, config: dict[str, Any]) -> torch.dtype:
    """The dtype of a model's weights by config.json; bf16 where it names none.

    Raises:
        CheckpointError: it names one that is no weight's.
    """
    names = {str(dtype).removeprefix("torch."): dtype for dtype in WEIGHT_DTYPES}
    text = config.get("text_config")
    said = {**(text if isinstance(text, dict) else {}), **config}
    name = said.get("dtype", said.get("torch_dtype", "bfloat16"))
    if not isinstance(name, str) or name not in names:
        raise CheckpointError(
            f"{path / 'config.json'}: dtype {name!r} is none of {', '.join(names)}.",
            hint="Give the original, unquantized checkpoint.",
        )
    return names[name]
