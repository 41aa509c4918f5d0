"""gpt-oss's MXFP4, read as the dense weights that it stands for (``quant_method: mxfp4``).

A weight is stored as E2M1 numbers ``X.weight_blocks`` uint8 [out_features, in_features / 32, 16], the even column in
the low half of a byte, and ``X.weight_scales`` uint8 [out_features, in_features / 32], E8M0: powers of two from 2^-127
on, 255 for no number (OCP Microscaling Formats, version 1.0). A checkpoint has one tensor of each for all experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qconv.checkpoint.config import without_quantization
from qconv.checkpoint.header import TensorEntry
from qconv.checkpoint.quantized import QuantizedCheckpoint, codes_of
from qconv.checkpoint.reader import Checkpoint, map_tensor
from qconv.errors import CheckpointError

METHOD = "mxfp4"
BLOCKS, SCALES = "weight_blocks", "weight_scales"
BLOCK = 32
"""Elements that share a scale, in 16 bytes."""
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LEVELS = torch.tensor([*_VALUES, *(-value for value in _VALUES)])
_PAIRS = torch.stack([_LEVELS.repeat(16), _LEVELS.repeat_interleave(16)], dim=1)
"""float32 [256, 2]: the two numbers of each byte."""


@dataclass(frozen=True, slots=True)
class Mxfp4Checkpoint(QuantizedCheckpoint):
    """An MXFP4 checkpoint as the dense one that it stands for."""

    @property
    def kind(self) -> str:
        """MXFP4."""
        return "MXFP4"

    @classmethod
    def of(cls, stored: Checkpoint, dtype: torch.dtype) -> Mxfp4Checkpoint:
        """Check that blocks and scales belong together.

        Args:
            stored: The checkpoint, with tensors for each expert.
            dtype: The dtype that weights are rounded to; bf16 and float32 hold all of them.

        Raises:
            CheckpointError: no MXFP4 weight at all, or blocks without scales, scales without blocks, or one of another
                shape or dtype.
        """
        codes = codes_of(stored, BLOCKS)
        if not codes:
            raise CheckpointError(
                f"{stored.path}: config.json says {METHOD}, but no tensor holds blocks of it.",
                hint="config.json belongs to another checkpoint.",
            )
        scales = {name: _scales_of(name, entry, stored) for name, entry in codes.items()}
        held = {entry.name for entry in (*codes.values(), *scales.values())}
        entries = {name: entry for name, entry in stored.entries.items() if name not in held}
        for name, entry in entries.items():
            if name.endswith(f".{SCALES}"):
                raise CheckpointError(
                    f"{entry.file}: {name!r} are the scales of no blocks.", hint="Download the checkpoint again."
                )
        for name, entry in codes.items():
            shape = (entry.shape[0], entry.shape[1] * BLOCK)
            nbytes = shape[0] * shape[1] * dtype.itemsize
            entries[name] = replace(entry, name=name, dtype=dtype, shape=shape, nbytes=nbytes, strides=())
        config = without_quantization(stored.config)
        return cls(entries, stored.path, config, stored, codes, scales, {}, ())

    def _dense(self, name: str, codes: Tensor, rows: Tensor) -> Tensor:
        """Numbers times their powers of two: exact in float32."""
        entry = self.entry(name)
        scales = map_tensor(self.scales[name])[rows].view(torch.float8_e8m0fnu).float()
        values = _PAIRS[codes.int()].view(*codes.shape[:2], BLOCK).mul_(scales.unsqueeze(-1))
        return values.view(len(codes), entry.shape[1]).to(entry.dtype)


def _scales_of(name: str, blocks: TensorEntry, stored: Checkpoint) -> TensorEntry:
    """The scales of a weight's blocks, both of the right shape and dtype."""
    beside = f"{name.removesuffix('weight')}{SCALES}"
    scales = stored.entries.get(beside)
    if scales is None:
        raise CheckpointError(
            f"{blocks.file}: {blocks.name!r} has no {beside!r} beside it.",
            hint="Its scales are what makes the codes a weight: download the checkpoint again.",
        )
    for entry, shape in ((blocks, (*blocks.shape[:2], BLOCK // 2)), (scales, blocks.shape[:2])):
        if len(blocks.shape) != 3 or entry.shape != shape or entry.dtype != torch.uint8:
            raise CheckpointError(
                f"{entry.file}: {entry.name!r} is {entry.dtype_name} {list(entry.shape)}; blocks are U8 "
                f"[out_features, in_features / {BLOCK}, {BLOCK // 2}], their scales U8 of the first two of these.",
                hint="config.json belongs to another checkpoint, or the shard is wrong.",
            )
    return scales
