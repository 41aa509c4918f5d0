"""compressed-tensors' packed integers as a source: read as the dense weights that they stand for.

A weight is stored as ``X.weight_packed``, ``X.weight_scale`` and ``X.weight_shape`` (:mod:`qconv.formats.packed`),
whoever wrote them; Kimi's experts are published so. Which linears lie so the files say, on which grid config.json does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qconv.checkpoint.config import without_quantization
from qconv.checkpoint.fp8 import ACTIVATION_LEAVES, SCALE_DTYPES, is_cache_scale
from qconv.checkpoint.header import DTYPE_NAMES, TensorEntry, TensorSpec
from qconv.checkpoint.quantized import QuantizedCheckpoint, codes_of
from qconv.checkpoint.reader import Checkpoint, map_tensor, require_finite
from qconv.core.qtensor import Grid, QTensor
from qconv.errors import CheckpointError
from qconv.formats import get_format
from qconv.formats.base import Described
from qconv.formats.compressed_tensors import is_of_kind
from qconv.formats.packed import PACK_QUANTIZED, PACKED, unpack_rows

CODES, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
LEAVES = (CODES, SCALE, SHAPE, "weight_zero_point", "weight_g_idx")
_HINT = "The shards belong to different checkpoints, or a weight was replaced in part: download the checkpoint again."


def packed_integers(section: Mapping[str, Any], dtype: torch.dtype) -> Described | None:
    """What a ``quantization_config`` says of packed integers; None if it is of something else.

    Raises:
        CheckpointError: packed integers of a kind that is not read; names the key.
    """
    if not is_of_kind(dict(section), PACK_QUANTIZED):
        return None
    return get_format("w4a16").read_config(dict(section), dtype)


@dataclass(frozen=True, slots=True)
class PackedCheckpoint(QuantizedCheckpoint):
    """A checkpoint of packed integers as the dense one that it stands for.

    Attributes:
        grids: The grid of each packed weight, by its name.
    """

    grids: Mapping[str, Grid]

    @property
    def kind(self) -> str:
        """Integers, with the bits of each grid."""
        bits = sorted({grid.bits for grid in self.grids.values()})
        return f"packed integers of {' and '.join(map(str, bits))} bits"

    @classmethod
    def of(cls, stored: Checkpoint, described: Described, dtype: torch.dtype) -> PackedCheckpoint:
        """Check that the parts of each weight belong together.

        Args:
            stored: The checkpoint.
            described: What its config.json says.
            dtype: The dtype that weights are rounded to.

        Raises:
            CheckpointError: no packed weight at all, one that lacks a part or is there densely too, a part of another
                shape or dtype, or one that belongs to no packed weight.
        """
        codes = codes_of(stored, CODES)
        if not codes:
            raise CheckpointError(
                f"{stored.path}: config.json says {PACK_QUANTIZED}, but no tensor is a {CODES}.",
                hint="config.json belongs to another checkpoint.",
            )
        modules = [name.removesuffix(".weight") for name in codes]
        targeted = described.grids(modules)
        grids = {name: _grid(targeted.get(module), codes[name]) for name, module in zip(codes, modules, strict=True)}
        shapes = {name: (one.shape[0], one.shape[1] * 32 // grids[name].bits) for name, one in codes.items()}
        parts = {name: _parts(stored, name, shape, grids[name]) for name, shape in shapes.items()}
        held = {one.name for of in parts.values() for one in of}
        ignored = {name for name in stored.entries if name not in held and _says_nothing(name, grids)}
        apart = held | ignored
        entries = {name: entry for name, entry in stored.entries.items() if name not in apart}
        _require_whole(entries, codes)
        for name, shape in shapes.items():
            nbytes = shape[0] * shape[1] * dtype.itemsize
            entries[name] = replace(codes[name], name=name, dtype=dtype, shape=shape, nbytes=nbytes)
        config = without_quantization(stored.config)
        scales = {name: one[1] for name, one in parts.items()}
        others = {name: one[2:] for name, one in parts.items()}
        return cls(entries, stored.path, config, stored, codes, scales, others, tuple(sorted(ignored)), grids)

    def _dense(self, name: str, codes: Tensor, rows: Tensor) -> Tensor:
        """Codes less their zero point, times their scale."""
        grid, entry = self.grids[name], self.entry(name)
        others = {one.name.rpartition(".")[2]: map_tensor(one) for one in self.others[name]}
        if others[SHAPE].tolist() != list(entry.shape):
            raise CheckpointError(
                f"{entry.file}: {name.removesuffix('weight')}{SHAPE} is {others[SHAPE].tolist()}, its {CODES} holds "
                f"{list(entry.shape)}.",
                hint=_HINT,
            )
        scale = self.scales[name]
        zero_points = others.get("weight_zero_point")
        if zero_points is not None:
            zero_points = unpack_rows(zero_points.t().contiguous(), grid.bits).t()[rows]
        index = others.get("weight_g_idx")
        if index is not None and bool(((index < 0) | (index >= scale.shape[1])).any()):
            raise CheckpointError(
                f"{entry.file}: {name.removesuffix('weight')}weight_g_idx names a group that there is not; there are "
                f"{scale.shape[1]}.",
                hint=_HINT,
            )
        scales = require_finite(map_tensor(scale), scale)[rows]
        weight = QTensor(grid, unpack_rows(codes, grid.bits), scales, zero_points, index)
        return weight.dequantize(entry.dtype)


def _grid(grid: Grid | None, codes: TensorEntry) -> Grid:
    """The grid of a weight of which the codes are there."""
    if grid is None:
        raise CheckpointError(
            f"{codes.file}: {codes.name!r} is packed, but no config group of config.json targets it.",
            hint="config.json belongs to another checkpoint.",
        )
    if codes.dtype != torch.int32 or len(codes.shape) != 2:
        raise CheckpointError(
            f"{codes.file}: {codes.name!r} is {codes.dtype_name} {list(codes.shape)}; packed codes are I32 "
            "[out_features, words].",
            hint=_HINT,
        )
    return grid


def _parts(stored: Checkpoint, name: str, shape: tuple[int, int], grid: Grid) -> tuple[TensorEntry, ...]:
    """The tensors that a weight is made of, in the order of the layout: codes, scales, the rest."""
    module = name.removesuffix(".weight")
    problem = PACKED.check(*shape, grid)
    if problem is not None:
        codes = stored.entry(f"{module}.{CODES}")
        raise CheckpointError(
            f"{codes.file}: {codes.name!r} is not what config.json says: {problem}.",
            hint="config.json belongs to another checkpoint, or the shard is wrong.",
        )
    find = partial(_part, stored, f"{module}.{CODES}")
    return tuple(map(find, PACKED.specs(module, *shape, grid)))


def _part(stored: Checkpoint, codes: str, spec: TensorSpec) -> TensorEntry:
    entry = stored.entries.get(spec.name)
    if entry is None:
        raise CheckpointError(
            f"{stored.entry(codes).file}: {codes!r} has no {spec.name!r} beside it.",
            hint="Without it the codes are no weight: download the checkpoint again.",
        )
    leaf = spec.name.rpartition(".")[2]
    allowed = {SCALE: SCALE_DTYPES, SHAPE: (torch.int64, torch.int32)}.get(leaf, (spec.dtype,))
    if entry.shape != spec.shape or entry.dtype not in allowed:
        raise CheckpointError(
            f"{entry.file}: {spec.name!r} is {entry.dtype_name} {list(entry.shape)}; {codes!r} needs "
            f"{list(spec.shape)} of {', '.join(DTYPE_NAMES[dtype] for dtype in allowed)}.",
            hint="config.json belongs to another checkpoint, or the shard is wrong.",
        )
    return entry


def _says_nothing(name: str, grids: Mapping[str, Grid]) -> bool:
    """Whether a tensor concerns activations, a cache, or the order of groups that are in order."""
    module, _, leaf = name.rpartition(".")
    grid = grids.get(f"{module}.weight")
    return is_cache_scale(name) or (grid is not None and leaf in (*ACTIVATION_LEAVES, "weight_g_idx"))


def _require_whole(entries: Mapping[str, TensorEntry], codes: Mapping[str, TensorEntry]) -> None:
    """Check that no part is left that belongs to no weight, and no weight is there twice."""
    for name, entry in entries.items():
        if name in codes:
            raise CheckpointError(f"{entry.file}: {name!r} is there densely and packed.", hint=_HINT)
        if name.rpartition(".")[2] in LEAVES:
            raise CheckpointError(f"{entry.file}: {name!r} belongs to no packed weight.", hint=_HINT)
