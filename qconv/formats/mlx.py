"""MLX's layout: codes in words of 32 bits, a scale and a bias a group, a layer's experts in one tensor.

``X.weight`` uint32 [out, in * bits / 32], a row's codes a stream of bits, the first in the lowest; ``X.scales`` [out,
in / group_size]. In mode ``affine`` a weight is ``code * scale + bias``, with ``X.biases`` of the shape and dtype of
the scales; in ``mxfp4``, ``mxfp8`` and ``nvfp4`` it is a float times a scale of 8 bits. Experts lie in
``mlp.switch_mlp.{gate,up,down}_proj`` [experts, ...] (mlx: quantize; mlx_lm/utils.py: load_model, and each model's
sanitize). config.json says it twice, as ``quantization`` and as ``quantization_config``, with exceptions by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qconv.checkpoint.header import TensorSpec
from qconv.core.qtensor import Grid, Number, QTensor
from qconv.core.settings import GridSettings
from qconv.errors import CheckpointError, RecipeError
from qconv.formats.base import (
    AllInConfig,
    Described,
    Group,
    Place,
    TensorReader,
    by_rows,
    pack_pairs,
    read_tensors,
    unpack_pairs,
)

METHOD, KEY = "mlx", "quantization"
BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
_FLOATS: dict[tuple[Number, int], tuple[str, torch.dtype]] = {
    ("e2m1", 32): ("mxfp4", torch.float8_e8m0fnu),
    ("e2m1", 16): ("nvfp4", torch.float8_e4m3fn),
    ("e4m3", 32): ("mxfp8", torch.float8_e8m0fnu),
}
"""Modes by what codes are and how many share a scale, with what scales are."""
_EXPERT = re.compile(r"(?P<block>.+)\.experts\.(?P<number>\d+)\.(?P<role>\w+)(?P<rest>.*)")
_ROLES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "glm4_moe", "olmoe")
"""Those whose tensors mlx-lm takes as they are, experts stacked; of others it renames, splits or changes some."""


@dataclass(frozen=True, slots=True)
class ByPath(Described):
    """What config.json tells: a grid, and those of single modules by mlx-lm's names; None where one is plain."""

    paths: Mapping[str, Grid | None] = field(default_factory=dict)

    def grids(self, modules: Iterable[str]) -> dict[str, Grid]:
        """See :class:`Described`."""
        found = {}
        for module in modules:
            grid = self.paths.get(called(module), self.grid)
            if grid is not None:
                found[module] = grid
        return found


def called(name: str) -> str:
    """What mlx-lm calls a module or tensor."""
    found = _EXPERT.fullmatch(name)
    if found is None:
        return name
    return f"{found['block']}.switch_mlp.{_ROLES.get(found['role'], found['role'])}{found['rest']}"


class MlxFormat(AllInConfig):
    """All of its modes, each linear in its own."""

    name = "mlx"
    pack_columns = 1
    act_order = False
    mixes = True
    families = FAMILIES
    framework = "mlx"
    lists_skipped = False
    rounds_inputs = False
    holds_verbatim = False
    fuses = False

    def keys(self, section: Mapping[str, Any]) -> Mapping[str, Any]:
        """Both that its readers look under."""
        return {KEY: section, "quantization_config": section}

    def place(self, tensor: str) -> Place | None:
        """An expert's place among those of its layer."""
        found = _EXPERT.fullmatch(tensor)
        return None if found is None else Place(called(tensor), int(found["number"]))

    def grid(self, settings: GridSettings, weight_dtype: torch.dtype, number: Number | None = None) -> Grid:
        """Integers with a scale and a bias a group, or floats.

        Raises:
            RecipeError: there are none of those bits and groups.
        """
        bits, size = settings.bits, settings.group_size
        if number in ("e2m1", "e4m3"):
            mode = _FLOATS.get((number, size))
            if mode is None or bits != (4 if number == "e2m1" else 8) or settings.symmetric is False:
                raise RecipeError("grid: mlx has no such floats: mxfp4, mxfp8 and nvfp4.")
            return Grid(bits, size, True, mode[1], number)
        if bits not in BITS:
            raise RecipeError(f"grid.bits: mlx has no codes of {bits} bits, but of {', '.join(map(str, BITS))}.")
        if size not in GROUPS:
            raise RecipeError(f"grid.group_size: mlx has groups of 32, 64 and 128, not of {size}.")
        symmetric = settings.symmetric is True
        return Grid(bits, size, symmetric, weight_dtype, based=not symmetric)

    def check(self, out_features: int, in_features: int, grid: Grid) -> str | None:
        """Whole groups."""
        if in_features % grid.group_size:
            return f"group size {grid.group_size} does not divide its {in_features} input features"
        return None

    def specs(self, module: str, out_features: int, in_features: int, grid: Grid) -> list[TensorSpec]:
        """weight, scales, of integers biases."""
        groups = (out_features, in_features // grid.group_size)
        scale = torch.uint8 if grid.is_float else grid.scale_dtype
        specs = [
            TensorSpec(f"{module}.weight", torch.uint32, (out_features, in_features * grid.bits // 32)),
            TensorSpec(f"{module}.scales", scale, groups),
        ]
        return specs if grid.is_float else [*specs, TensorSpec(f"{module}.biases", scale, groups)]

    def pack(self, module: str, weight: QTensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors of :meth:`specs`."""
        grid = weight.grid
        yield f"{module}.weight", pack_words(weight.codes.view(torch.uint8), grid.bits)
        if grid.is_float:
            scales = weight.steps().to(torch.float8_e4m3fn) if grid.has_global_scale else weight.scales
            yield f"{module}.scales", scales.view(torch.uint8)
            return
        yield f"{module}.scales", weight.scales
        yield f"{module}.biases", biases_of(weight).to(weight.scales.dtype)

    def unpack(self, module: str, shape: tuple[int, int], read: TensorReader, grid: Grid) -> QTensor:
        """Codes, scales and biases of a linear of ``shape``.

        Raises:
            CheckpointError: a tensor is absent or misshapen, or biases are no zero points on a grid that has those.
        """
        tensors = read_tensors(self.specs(module, *shape, grid), module, read)
        codes, scales = unpack_words(tensors["weight"], grid.bits), tensors["scales"]
        if grid.is_float:
            codes = codes.view(torch.float8_e4m3fn) if grid.number == "e4m3" else codes
            return QTensor(grid, codes, scales.contiguous().view(grid.scale_dtype), None)
        weight = QTensor(based(grid), codes, scales, None, biases=tensors["biases"])
        if grid.based:
            return weight
        found = with_zero_points(weight)
        if found is None or found.grid != grid:
            raise CheckpointError(f"{module}.biases: are not the zero points that they should be.")
        return found

    def config(self, quantized: Mapping[Grid, Sequence[str]], skipped: Sequence[str]) -> dict[str, Any]:
        """The mode that most modules have, and each other's by its name."""
        modes = {called(name): mode_of(grid) for grid, names in quantized.items() for name in names}
        found = list(modes.values()) or [mode_of(grid) for grid in quantized]
        most = max(found, key=found.count)
        return {**most, **{name: mode for name, mode in modes.items() if mode != most}}

    def recognizes(self, section: dict[str, Any]) -> bool:
        """The method by which qconv calls a section that names none."""
        return section.get("quant_method") == METHOD

    def read_config(self, section: dict[str, Any], weight_dtype: torch.dtype) -> Described:
        """The common grid and the exceptions.

        Raises:
            CheckpointError: a mode that is not read.
        """
        common = grid_of(section, KEY, weight_dtype)
        paths: dict[str, Grid | None] = {}
        for name, value in section.items():
            if isinstance(value, dict):
                # What names no mode is affine, whatever the others are.
                paths[name] = grid_of({"mode": "affine"} | value, f"{KEY}.{name}", weight_dtype)
            elif value is False:
                paths[name] = None
        return ByPath((Group(common),), (), False, paths)

    def is_skipped(self, module: str, skipped: Sequence[str]) -> bool:
        """Readers look for scales, whatever config.json says."""
        return False


def mode_of(grid: Grid) -> dict[str, int | str]:
    """What config.json says of a module's grid."""
    name = _FLOATS[grid.number, grid.group_size][0] if grid.is_float else "affine"
    return {"group_size": grid.group_size, "bits": grid.bits, "mode": name}


def grid_of(said: Mapping[str, Any], key: str, scale_dtype: torch.dtype) -> Grid:
    """Of a mode.

    Raises:
        CheckpointError: one that is not read.
    """
    bits, size, mode = said.get("bits"), said.get("group_size"), said.get("mode", "affine")
    if isinstance(bits, int) and isinstance(size, int):
        if mode == "affine" and bits in BITS and size in GROUPS:
            return Grid(bits, size, False, scale_dtype, based=True)
        for (number, group), (name, dtype) in _FLOATS.items():
            if (mode, size, bits) == (name, group, 4 if number == "e2m1" else 8):
                return Grid(bits, group, True, dtype, number)
    raise CheckpointError(
        f"config.json: {key}: mode {mode!r} of {bits!r} bits in groups of {size!r} is none that is read.",
        hint="Quantize the original model again.",
    )


def based(grid: Grid) -> Grid:
    """The grid of integers with biases that holds another's numbers, where those are numbers of its dtype."""
    return Grid(grid.bits, grid.group_size, False, grid.scale_dtype, based=True)


def biases_of(weight: QTensor) -> Tensor:
    """What codes of 0 stand for, float64 of the scales' shape; of integers."""
    if weight.biases is not None:
        return weight.biases.double()
    zeros: Tensor | int = weight.grid.mid if weight.zero_points is None else weight.zero_points.double()
    return -(weight.scales.double() * zeros)


def with_zero_points(weight: QTensor) -> QTensor | None:
    """A weight with biases as one with zero points, or without where all are the middle; None where it is neither."""
    assert weight.biases is not None
    scales, grid = weight.scales, weight.grid
    if not bool((scales > 0).all()):
        return None
    zeros = -weight.biases.double() / scales.double()
    if not bool(((zeros == zeros.round()) & (zeros >= 0) & (zeros < grid.levels)).all()):
        return None
    symmetric = bool((zeros == grid.mid).all())
    plain = Grid(grid.bits, grid.group_size, symmetric, grid.scale_dtype)
    return QTensor(plain, weight.codes, scales, None if symmetric else zeros.to(torch.uint8))


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes, uint8 [rows, columns], as words, uint32 [rows, columns * bits / 32], the first code lowest."""

    def some(values: Tensor) -> Tensor:
        if bits == 8:
            data = np.ascontiguousarray(values.numpy())
        elif bits == 4:
            data = pack_pairs(values).numpy()
        else:
            each = np.unpackbits(values.numpy()[..., None], axis=-1, count=bits, bitorder="little")
            data = np.packbits(each.reshape(len(values), -1), axis=-1, bitorder="little")
        return torch.from_numpy(np.ascontiguousarray(data).view(np.uint32))

    return by_rows(some, codes.contiguous())


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`pack_words`."""

    def some(values: Tensor) -> Tensor:
        data = np.ascontiguousarray(values.numpy()).view(np.uint8)
        if bits == 8:
            return torch.from_numpy(data)
        if bits == 4:
            return unpack_pairs(torch.from_numpy(data))
        each = np.unpackbits(data, axis=-1, bitorder="little").reshape(len(data), -1, bits)
        return torch.from_numpy(np.packbits(each, axis=-1, bitorder="little")[..., 0])

    return by_rows(some, words.contiguous(), growth=32 // bits)


FORMAT = MlxFormat()
