"""compressed-tensors' layouts of integers: ``pack-quantized``, codes in words, and ``int-quantized``, codes as int8.

pack-quantized has ``weight_packed`` int32 [out, in*bits/32], low bits first along the input dimension, values offset to
unsigned; ``weight_scale`` [out, groups] in the weight's dtype; ``weight_shape`` int64 [2]; asymmetric grids add
``weight_zero_point`` int32 [out*bits/32, groups], packed along the output dimension. Builds with ``actorder: group``,
which compressed-tensors wrote until 2026 and qconv only reads, add ``weight_g_idx`` int32 [in], each input's group;
codes keep the inputs' own order.

int-quantized, W8A8's weights, has ``weight`` int8 [out, in] and ``weight_scale``. compressed-tensors 0.20 also writes
int4 so, one number a byte, where inputs are rounded, too; qconv reads that, and writes words.

Either may say that engines round each token's inputs by its own range, to 8-bit integers or to E4M3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qconv.checkpoint.header import TensorSpec
from qconv.core.qtensor import CHANNEL, Grid, Number, QTensor
from qconv.core.settings import GridSettings
from qconv.errors import CheckpointError, RecipeError
from qconv.formats.base import TensorReader, by_rows, pack_pairs, read_tensors, unpack_pairs

PACK_QUANTIZED, INT_QUANTIZED = "pack-quantized", "int-quantized"
ACT_ORDER = ("group", "dynamic", True)
"""How ``actorder`` says that groups are of inputs in an order of their own; other values leave groups as they are."""
_KINDS: dict[Number, str] = {"int": "int", "e4m3": "float"}
"""What config groups call the numbers that inputs are rounded to."""


@dataclass(frozen=True, slots=True)
class WholeNumberGrid(Grid):
    """The grid of a file that holds whole numbers, and not words of packed codes."""


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """Pack 4- or 8-bit values, uint8 [rows, columns], to int32 [rows, columns*bits/32], low bits first."""
    rows, columns = values.shape
    packed = pack_pairs(values) if bits == 4 else values
    return packed.reshape(-1).view(torch.int32).view(rows, columns * bits // 32)


def unpack_rows(words: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`pack_rows`: int32 [rows, words] to uint8 [rows, words*32/bits]."""
    values = words.contiguous().view(torch.uint8)
    return unpack_pairs(values) if bits == 4 else values


class PackedLayout:
    """Words of packed codes, of 4 or 8 bits."""

    kind = PACK_QUANTIZED

    def grid(self, settings: GridSettings, weight_dtype: torch.dtype) -> Grid:
        """Symmetric unless the recipe says otherwise; scales in the weight's dtype.

        Raises:
            RecipeError: bits that the layout does not pack into whole words.
        """
        if settings.bits not in (4, 8):
            raise RecipeError(
                f"grid.bits: compressed-tensors' integers, as format w4a16 has them, have 4 or 8 bits, not "
                f"{settings.bits}."
            )
        symmetric = True if settings.symmetric is None else settings.symmetric
        return Grid(settings.bits, settings.group_size, symmetric, weight_dtype)

    def check(self, out_features: int, in_features: int, grid: Grid) -> str | None:
        """Whole words and whole groups along the input, and along the output where zero points are packed."""
        per_word = 32 // grid.bits
        if grid.group_size != CHANNEL and in_features % grid.group_size:
            return f"group size {grid.group_size} does not divide its {in_features} input features"
        if in_features % per_word:
            return f"its {in_features} input features are not a multiple of {per_word}"
        if not grid.symmetric and out_features % per_word:
            return f"its {out_features} output features are not a multiple of {per_word}"
        return None

    def specs(self, module: str, out_features: int, in_features: int, grid: Grid) -> list[TensorSpec]:
        """weight_packed, weight_scale, weight_zero_point (asymmetric), weight_shape, weight_g_idx (act-order)."""
        per_word, groups = 32 // grid.bits, grid.groups(in_features)
        specs = [
            TensorSpec(f"{module}.weight_packed", torch.int32, (out_features, in_features // per_word)),
            TensorSpec(f"{module}.weight_scale", grid.scale_dtype, (out_features, groups)),
        ]
        if not grid.symmetric:
            specs.append(TensorSpec(f"{module}.weight_zero_point", torch.int32, (out_features // per_word, groups)))
        specs.append(TensorSpec(f"{module}.weight_shape", torch.int64, (2,)))
        if grid.act_order:
            specs.append(TensorSpec(f"{module}.weight_g_idx", torch.int32, (in_features,)))
        return specs

    def pack(self, module: str, weight: QTensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors of :meth:`specs`."""
        bits = weight.grid.bits
        yield f"{module}.weight_packed", by_rows(partial(pack_rows, bits=bits), weight.codes)
        yield f"{module}.weight_scale", weight.scales
        if weight.zero_points is not None:
            yield f"{module}.weight_zero_point", pack_rows(weight.zero_points.t(), bits).t().contiguous()
        yield f"{module}.weight_shape", torch.tensor(weight.shape, dtype=torch.int64)
        if weight.group_index is not None:
            yield f"{module}.weight_g_idx", weight.group_index

    def unpack(self, module: str, shape: tuple[int, int], read: TensorReader, grid: Grid) -> QTensor:
        """Codes, scales and zero points of a linear of ``shape``.

        Raises:
            CheckpointError: a tensor is absent or misshapen, weight_shape says something else, or weight_g_idx names
                no group.
        """
        tensors = read_tensors(self.specs(module, *shape, grid), module, read)
        if tensors["weight_shape"].tolist() != list(shape):
            raise CheckpointError(f"{module}.weight_shape: {tensors['weight_shape'].tolist()}, not {list(shape)}.")
        zero_points = None
        if not grid.symmetric:
            zero_points = unpack_rows(tensors["weight_zero_point"].t(), grid.bits).t().contiguous()
        codes = by_rows(partial(unpack_rows, bits=grid.bits), tensors["weight_packed"], growth=32 // grid.bits)
        index = tensors.get("weight_g_idx")
        if index is not None and bool(((index < 0) | (index >= grid.groups(shape[1]))).any()):
            raise CheckpointError(
                f"{module}.weight_g_idx: names a group that there is not; there are {grid.groups(shape[1])}.",
                hint="The build is damaged, or was saved before it was quantized.",
            )
        return QTensor(grid, codes, tensors["weight_scale"], zero_points, index)

    def describe(self, grid: Grid) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What a config group says of weights and of activations."""
        per_channel = grid.group_size == CHANNEL
        weights = {
            "num_bits": grid.bits,
            "type": "int",
            "symmetric": grid.symmetric,
            "strategy": "channel" if per_channel else "group",
            "group_size": None if per_channel else grid.group_size,
            "dynamic": False,
        }
        return weights, _input_arguments(grid)

    def read(self, group: Mapping[str, Any], weight_dtype: torch.dtype) -> Grid:
        """The grid of a config group.

        Raises:
            CheckpointError: weights of a kind that is not read.
        """
        weights = group.get("weights")
        if not isinstance(weights, dict):
            raise not_read("config_groups", "a group that describes no weights")
        bits, strategy, number = weights.get("num_bits"), weights.get("strategy"), weights.get("type", "int")
        if number != "int" or bits not in (4, 8):
            raise not_read("weights", f"{bits}-bit {number}; integers of 4 and 8 bits are read")
        if strategy not in ("group", "channel"):
            raise not_read("weights.strategy", f"{strategy!r}; group and channel are read")
        group_size = CHANNEL if strategy == "channel" else weights.get("group_size")
        if not isinstance(group_size, int) or (group_size < 1 and group_size != CHANNEL):
            raise not_read("weights.group_size", repr(group_size))
        symmetric, act_order = bool(weights.get("symmetric", True)), weights.get("actorder") in ACT_ORDER
        grid = Grid(bits, group_size, symmetric, weight_dtype, act_order=act_order and group_size != CHANNEL)
        number = by_token(group)
        return grid if number is None else replace(grid, activations="dynamic", activation_number=number)


class WholeNumberLayout(PackedLayout):
    """int8 numbers, where :class:`PackedLayout` has words of codes."""

    kind = INT_QUANTIZED

    def specs(self, module: str, out_features: int, in_features: int, grid: Grid) -> list[TensorSpec]:
        """weight, weight_scale."""
        return [
            TensorSpec(f"{module}.weight", torch.int8, (out_features, in_features)),
            TensorSpec(f"{module}.weight_scale", grid.scale_dtype, (out_features, grid.groups(in_features))),
        ]

    def pack(self, module: str, weight: QTensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors of :meth:`specs`."""
        # Bytes wrap around, so that below the middle they are negative numbers.
        yield f"{module}.weight", weight.codes.sub(weight.grid.mid).view(torch.int8)
        yield f"{module}.weight_scale", weight.scales

    def unpack(self, module: str, shape: tuple[int, int], read: TensorReader, grid: Grid) -> QTensor:
        """Codes, each the middle of the grid more than the number in the file, and scales.

        Raises:
            CheckpointError: a tensor is absent or misshapen, or holds a number that the grid has not.
        """
        tensors = read_tensors(self.specs(module, *shape, grid), module, read)
        codes = tensors["weight"].view(torch.uint8).add(grid.mid)
        if codes.numel() and int(codes.max()) >= grid.levels:
            raise CheckpointError(
                f"{module}.weight: holds a number of more than {grid.bits} bits.",
                hint="The build is damaged, or config.json belongs to another one.",
            )
        return QTensor(grid, codes, tensors["weight_scale"], None)

    def read(self, group: Mapping[str, Any], weight_dtype: torch.dtype) -> Grid:
        """The grid of a config group.

        Raises:
            CheckpointError: as of packed ones, or weights with zero points.
        """
        grid = super().read(group, weight_dtype)
        if not grid.symmetric:
            raise CheckpointError(
                "config.json: int-quantized weights with symmetric false; they are read without zero points.",
                hint="Quantize the original model in a way that is read.",
            )
        return whole_numbers(grid)


def whole_numbers(grid: Grid) -> WholeNumberGrid:
    """The same grid in a file of whole numbers."""
    return WholeNumberGrid(**{field.name: getattr(grid, field.name) for field in fields(grid)})


def by_token(group: Mapping[str, Any]) -> Number | None:
    """What a config group rounds inputs to by each token's own range; None if it leaves them, or does otherwise."""
    activations = group.get("input_activations")
    if not isinstance(activations, dict):
        return None
    return next((number for number in _KINDS if _by_token(number).items() <= activations.items()), None)


def _input_arguments(grid: Grid) -> dict[str, Any] | None:
    """What a config group says of activations."""
    if grid.activations == "none":
        return None
    return {**_by_token(grid.activation_number), "group_size": None}


def _by_token(number: Number) -> dict[str, Any]:
    return {"num_bits": 8, "type": _KINDS[number], "symmetric": True, "strategy": "token", "dynamic": True}


def not_read(key: str, value: str) -> CheckpointError:
    """The error of a ``quantization_config`` whose value under a key is not read."""
    return CheckpointError(
        f"config.json: quantization_config.{key} is {value}.",
        hint="Quantize the original model in a way that is read, or give the unquantized checkpoint.",
    )


PACKED, WHOLE_NUMBERS = PackedLayout(), WholeNumberLayout()
