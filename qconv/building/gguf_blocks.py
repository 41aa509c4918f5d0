"""Blocks of rows of a GGUF build: encoded, or made by calibration, and a few rows of each decoded again."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from qconv.artifacts.gguf_tensors import encoder
from qconv.core.qtensor import SquaredError
from qconv.errors import VerificationError
from qconv.formats.gguf.names import GgufTensor
from qconv.grids.ggml import encode
from qconv.verification.blocks import decoded

if TYPE_CHECKING:
    from qconv.building.gguf_stages import StagedLayers

SAMPLED_ROWS = 4
"""Of each block of rows, decoded again at once."""


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of a tensor that become blocks of its type.

    Attributes:
        name: Of the tensor.
        type: Its type.
        rows: What they stand for, [rows, columns]: as the source has them, or after folding.
        stored: As the source has them, the same shape.
        importance: Of their columns, float [columns], or None.
        ready: Their blocks where calibration has made them, uint8 [rows, bytes of a row]; else None.
        scale: What a tensor beside them multiplies them by.
    """

    name: str
    type: GGMLQuantizationType
    rows: Tensor
    stored: Tensor
    importance: Tensor | None
    ready: Tensor | None
    scale: float = 1.0


class MadeBlocks(Protocol):
    """What has a tensor's blocks before the file is written."""

    def blocks(self, tensor: GgufTensor, part: int) -> Tensor:
        """The blocks of one part of a tensor, uint8 [rows, bytes of a row], in file order."""


@dataclass(slots=True)
class Ready:
    """A tensor's blocks that are made already, handed out in file order.

    Attributes:
        scales: What a tensor beside them multiplies the parts by; empty for nothing.
    """

    layers: MadeBlocks
    tensor: GgufTensor
    scales: Sequence[float] = ()
    part: int = -1
    data: Tensor = field(default_factory=lambda: torch.empty(0))
    row: int = 0

    @classmethod
    def of(cls, layers: StagedLayers | None, tensor: GgufTensor) -> Ready | None:
        """Of a tensor, or None where it is not calibrated."""
        return cls(layers, tensor) if layers is not None and layers.holds(tensor) else None

    def take(self, part: int, rows: int) -> Tensor:
        """The next ``rows`` rows of a part."""
        if part != self.part:
            self.part, self.data, self.row = part, self.layers.blocks(self.tensor, part), 0
        taken = self.data[self.row : self.row + rows]
        self.row += rows
        return taken

    def scale(self, part: int) -> float:
        """What a part is multiplied by."""
        return self.scales[part] if self.scales else 1.0


@dataclass(frozen=True, slots=True)
class Encoded:
    """Their blocks, how many weights they are, the error of a few rows, and the checksum of what was read."""

    name: str
    data: Tensor
    weights: int
    error: SquaredError
    checksum: int


def encoded_block(block: Block) -> Encoded:
    """The block encoded, or as calibration has made it."""
    data = encode(block.rows, encoder(block.type), block.importance) if block.ready is None else block.ready
    reference = block.rows[:SAMPLED_ROWS].float().contiguous()
    error = SquaredError.between_(reference, decoded(data[:SAMPLED_ROWS], block.type).mul_(block.scale))
    return Encoded(block.name, data, block.rows.numel(), error, block_checksum(block))


def block_checksum(block: Block) -> int:
    """CRC-32 of the rows as they are stored."""
    rows = block.stored.contiguous().view(-1).view(torch.uint8)
    return zlib.crc32(rows.numpy().data) if rows.numel() else 0


def require_standing(what: str, snr_db: float, floor_db: float) -> None:
    """Check that encoded weights stand for the source.

    Raises:
        VerificationError: their signal to noise, in decibels, is below what their type reaches.
    """
    if not snr_db >= floor_db:
        raise VerificationError(
            f"{what} does not stand for the source: signal to noise {snr_db:.1f} dB, below {floor_db:.1f}.",
            hint="Nothing of this file was kept. If memory is sound, this is a bug.",
        )
