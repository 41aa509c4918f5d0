"""FP8 checkpoints, read as the dense ones that they stand for.

A weight is stored as E4M3 numbers ``X.weight`` [out_features, in_features] and scales ``X.weight_scale_inv`` or
``X.weight_scale``, which multiply under either name. Scales are shared by blocks (Qwen's and DeepSeek's releases,
``quant_method: fp8`` with a ``weight_block_size``), rows or whole tensors (compressed-tensors ``float-quantized``).
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qconv.checkpoint.config import without_quantization
from qconv.checkpoint.header import DTYPE_NAMES, TensorEntry
from qconv.checkpoint.quantized import QuantizedCheckpoint
from qconv.checkpoint.reader import Checkpoint, map_tensor, require_finite
from qconv.errors import CheckpointError

SCALE_LEAVES = ("weight_scale_inv", "weight_scale")
SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ACTIVATION_LEAVES = ("input_scale", "activation_scale")
"""Scales of a static build's activations, beside a weight's own; they say nothing about the weight."""
_CACHE_SCALE = re.compile(r"\.(self_attn\.(attn\.)?([qkv]|kv|prob)_scale|[kv]_proj\.([kv]|kv|output)_scale)$")
"""Scales of a cache of keys and values in FP8, as compressed-tensors, ModelOpt and their forerunners name them."""
WHOLE = 2**62
"""Side of a block that spans the weight, however large that is."""

_CHUNK_ELEMENTS = 1 << 17
_E4M3_MAX = 448.0


def is_cache_scale(name: str) -> bool:
    """Whether a tensor is a scale of a cache of keys and values: it concerns engines, and no weight."""
    return _CACHE_SCALE.search(name) is not None


@dataclass(frozen=True, slots=True)
class Fp8Scheme:
    """Which elements of a weight share a scale: blocks of ``rows`` times ``columns``, cut off at the weight's edges."""

    rows: int
    columns: int

    @classmethod
    def parse(cls, section: Mapping[str, Any]) -> Fp8Scheme | None:
        """The scheme that a ``quantization_config`` describes, None if its weights are not FP8.

        Raises:
            CheckpointError: FP8 of a kind that qconv does not read; names the key.
        """
        method = section.get("quant_method")
        if method == "fp8":
            _require(section, "fmt", (None, "e4m3"))
            size = section.get("weight_block_size")
            return cls(WHOLE, WHOLE) if size is None else cls(*_block("weight_block_size", size))
        if method == "compressed-tensors":
            return cls._of_groups(section)
        return None

    @classmethod
    def _of_groups(cls, section: Mapping[str, Any]) -> Fp8Scheme | None:
        """The one scheme of compressed-tensors' ``config_groups``."""
        groups = section.get("config_groups")
        weights = [group.get("weights") for group in groups.values()] if isinstance(groups, dict) else []
        if not weights or not all(
            isinstance(one, dict) and one.get("type") == "float" and one.get("num_bits") == 8 for one in weights
        ):
            return None
        _require(section, "format", ("float-quantized", "naive-quantized"))
        # Rotated or pruned weights are not the model's own, whatever their codes say.
        _require(section, "transform_config", (None, {}))
        _require(section, "sparsity_config", (None, {}, {"format": "dense"}))
        schemes = {cls._of_weights(one) for one in weights}
        if len(schemes) > 1:
            raise _not_read("config_groups", "groups with different scales")
        return schemes.pop()

    @classmethod
    def _of_weights(cls, weights: Mapping[str, Any]) -> Fp8Scheme:
        _require(weights, "symmetric", (None, True))
        strategy = weights.get("strategy")
        if strategy == "block":
            return cls(*_block("block_structure", weights.get("block_structure")))
        if strategy == "channel":
            return cls(1, WHOLE)
        if strategy in ("tensor", None):
            return cls(WHOLE, WHOLE)
        raise _not_read("strategy", repr(strategy))

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The shape of a weight's scales, [blocks down, blocks across], for the weight's own shape."""
        return -(-shape[0] // self.rows), -(-shape[1] // self.columns)

    def __str__(self) -> str:
        if self.columns == WHOLE:
            return "one scale a tensor" if self.rows == WHOLE else "one scale a row"
        return f"blocks of {self.rows} x {self.columns}"


@dataclass(frozen=True, slots=True)
class Dequantized(QuantizedCheckpoint):
    """An FP8 checkpoint as the dense one that it stands for.

    Attributes:
        scheme: Which elements share a scale.
    """

    scheme: Fp8Scheme

    @property
    def kind(self) -> str:
        """FP8, with its scheme."""
        return f"FP8 ({self.scheme})"

    def fingerprint(self) -> str:
        """sha256 over the stored checkpoint's fingerprint and every byte of every scale.

        Scales are a few kilobytes each: a page sampled here and there would mostly miss one that was repaired.

        Raises:
            CheckpointError: a shard cannot be read.
        """
        digest = hashlib.sha256(self.stored.fingerprint().encode())
        for file, entries in itertools.groupby(self.scales.values(), key=lambda entry: entry.file):
            try:
                with file.open("rb", buffering=0) as shard:
                    for entry in entries:
                        digest.update(os.pread(shard.fileno(), entry.nbytes, entry.offset))
            except OSError as error:
                raise CheckpointError(f"{file}: cannot be read: {error.strerror}.", hint="Check the disk.") from error
        return digest.hexdigest()

    @classmethod
    def of(cls, stored: Checkpoint, scheme: Fp8Scheme, dtype: torch.dtype) -> Dequantized:
        """Check that weights and scales belong together.

        Args:
            stored: The FP8 checkpoint.
            scheme: What its config.json says.
            dtype: The dtype that weights are rounded to.

        Raises:
            CheckpointError: no FP8 weight at all, one without a scale or with a scale of another shape or dtype, or a
                scale without its FP8 weight.
        """
        weights = [entry for entry in stored.entries.values() if entry.dtype == torch.float8_e4m3fn]
        if not weights:
            raise CheckpointError(
                f"{stored.path}: config.json says FP8 ({scheme}), but no tensor is F8_E4M3.",
                hint="config.json belongs to another checkpoint.",
            )
        scales = {entry.name: _scale_of(entry, scheme, stored) for entry in weights}
        modules = [name.removesuffix("weight") for name in scales]
        ignored = {f"{module}{leaf}" for module in modules for leaf in ACTIVATION_LEAVES} & stored.entries.keys()
        ignored |= {name for name in stored.entries if is_cache_scale(name)}
        apart = {entry.name for entry in scales.values()} | ignored
        for entry in stored.entries.values():
            if entry.name.rpartition(".")[2] in SCALE_LEAVES and entry.name not in apart:
                raise CheckpointError(
                    f"{entry.file}: {entry.name!r} is the scale of no FP8 weight.",
                    hint="The shards belong to different checkpoints, or a weight was replaced without its scale.",
                )
        entries = {
            name: replace(entry, dtype=dtype, nbytes=entry.numel * dtype.itemsize) if name in scales else entry
            for name, entry in stored.entries.items()
            if name not in apart
        }
        config = without_quantization(stored.config)
        codes = {entry.name: entry for entry in weights}
        return cls(entries, stored.path, config, stored, codes, scales, {}, tuple(sorted(ignored)), scheme)

    def _dense(self, name: str, codes: Tensor, rows: Tensor) -> Tensor:
        """Codes [n, in_features] of the weight's rows numbered ``rows`` [n], times their scales."""
        entry, scales = self.entry(name), self._scales(name)
        columns = entry.shape[1]
        width = min(self.scheme.columns, columns)
        dense = torch.empty(codes.shape, dtype=entry.dtype)
        # A chunk stays in the processor's cache, with its scales, of which most rows of a block share one.
        step = max(1, _CHUNK_ELEMENTS // max(1, columns))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            needed, of_rows = torch.unique_consecutive(rows[part] // self.scheme.rows, return_inverse=True)
            spread = scales[needed]
            if spread.shape[1] > 1:
                spread = spread.repeat_interleave(width, 1)[:, :columns]
            dense[part] = _decoded(codes[part]).mul_(spread[of_rows])
        return dense

    def _scales(self, name: str) -> Tensor:
        """A weight's scales, float32 [blocks down, blocks across], finite."""
        entry = self.scales[name]
        shape = self.scheme.scale_shape(self.entry(name).shape)
        return require_finite(map_tensor(entry), entry).float().view(shape)


def _decoded(codes: Tensor) -> Tensor:
    """E4M3 codes [rows, columns] as float32; less than half the time that torch's own conversion takes.

    Seen as a half, an E4M3 number's exponent and fraction moved up by 7 bits are the number over 256, since the
    exponents' biases are 7 and 15; that holds for subnormal numbers too. E4M3's one NaN alone comes out as 480.
    """
    words = codes.view(torch.int8).to(torch.int16)  # sign extended, so that the shift leaves the sign bit right
    halves = words.mul_(1 << 7).bitwise_and_(~(1 << 14)).view(torch.float16)
    values = halves.float().mul_(256.0)
    magnitudes = values.abs()
    if values.numel() and float(magnitudes.max()) > _E4M3_MAX:
        values[magnitudes > _E4M3_MAX] = math.nan
    return values


def _scale_of(weight: TensorEntry, scheme: Fp8Scheme, stored: Checkpoint) -> TensorEntry:
    """The scale of an FP8 weight, of the right shape and dtype."""
    module, _, leaf = weight.name.rpartition(".")
    if leaf != "weight" or len(weight.shape) != 2:
        raise CheckpointError(
            f"{weight.file}: {weight.name!r} is F8_E4M3 {list(weight.shape)}; only 2-D weights may be.",
            hint="Download the shard again, or give the unquantized checkpoint.",
        )
    names = [f"{module}.{leaf}" for leaf in SCALE_LEAVES]
    found = [stored.entries[name] for name in names if name in stored.entries]
    if len(found) != 1:
        fault = "both" if found else "neither"
        raise CheckpointError(
            f"{weight.file}: FP8 weight {weight.name!r} has {fault} of {' and '.join(names)}.",
            hint="Its scale is what makes the codes a weight: download the checkpoint again.",
        )
    (scale,) = found
    expected = scheme.scale_shape(weight.shape)
    # compressed-tensors writes a tensor's one scale as [1], transformers as [].
    fits = scale.numel == 1 if scheme.rows == scheme.columns == WHOLE else scale.shape == expected
    if not fits or scale.dtype not in SCALE_DTYPES:
        allowed = ", ".join(DTYPE_NAMES[dtype] for dtype in SCALE_DTYPES)
        raise CheckpointError(
            f"{scale.file}: {scale.name!r} is {DTYPE_NAMES[scale.dtype]} {list(scale.shape)}; {scheme} of "
            f"{list(weight.shape)} need {list(expected)} of {allowed}.",
            hint="config.json belongs to another checkpoint, or the shard is wrong.",
        )
    return scale


def _block(key: str, value: Any) -> tuple[int, int]:
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in value)
    ):
        raise _not_read(key, f"{value!r}, not two positive integers")
    return value[0], value[1]


def _require(section: Mapping[str, Any], key: str, allowed: tuple[Any, ...]) -> None:
    if section.get(key) not in allowed:
        raise _not_read(key, repr(section[key]))


def _not_read(key: str, value: str) -> CheckpointError:
    return CheckpointError(
        f"config.json: quantization_config.{key} is {value}: FP8 of a kind that qconv does not read.",
        hint="Give the unquantized checkpoint.",
    )
