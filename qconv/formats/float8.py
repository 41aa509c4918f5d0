"""What the FP8 formats share: E4M3 weights with their scales beside them; and compressed-tensors' layout of them.

``weight`` is F8_E4M3 [out, in]. Its scales multiply, whatever they are called; the one scale of a whole weight is [1],
those of rows are [out, 1], those of blocks [blocks down, blocks across]. A static ``input_scale`` is float32 [1].
MXFP8's scales are uint8 [out, in/32], E8M0: exponents of two plus 127.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qconv.checkpoint.header import TensorSpec
from qconv.core.qtensor import CHANNEL, Grid, QTensor
from qconv.core.settings import GridSettings
from qconv.errors import CheckpointError, RecipeError
from qconv.formats.base import TensorReader, read_tensors
from qconv.formats.packed import not_read

BLOCK = 128
"""Side of a block: what the kernels of engines are made for."""
SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""In which dtypes scales are found."""
FLOAT_QUANTIZED, MXFP8_QUANTIZED = "float-quantized", "mxfp8-quantized"
MXFP8 = Grid(8, 32, True, torch.float8_e8m0fnu, "e4m3", activations="dynamic")


class Float8Layout:
    """The tensors of an FP8 linear; a format adds its own config.json."""

    scale_leaf: str
    """What the scales' tensor is called."""

    def check(self, out_features: int, in_features: int, grid: Grid) -> str | None:
        """Every shape: blocks may be ragged at the edges."""
        return None

    def specs(self, module: str, out_features: int, in_features: int, grid: Grid) -> list[TensorSpec]:
        """weight, its scales, input_scale (static)."""
        specs = [
            TensorSpec(f"{module}.weight", torch.float8_e4m3fn, (out_features, in_features)),
            self._scale_spec(module, out_features, in_features, grid),
        ]
        if grid.activations == "static":
            specs.append(_input_spec(module))
        return specs

    def _scale_spec(self, module: str, out_features: int, in_features: int, grid: Grid) -> TensorSpec:
        whole = grid.block_rows == CHANNEL
        shape = (1,) if whole else grid.scale_shape(out_features, in_features)
        return TensorSpec(f"{module}.{self.scale_leaf}", grid.scale_dtype, shape)

    def pack(self, module: str, weight: QTensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors of :meth:`specs`."""
        scales = self._scale_spec(module, *weight.shape, weight.grid)
        yield f"{module}.weight", weight.codes
        yield scales.name, weight.scales.view(scales.shape)
        if weight.grid.activations == "static":
            if weight.input_scale is None:
                raise ValueError(f"{module}: static activations need an input scale")
            yield f"{module}.input_scale", weight.input_scale.view(1)

    def unpack(self, module: str, shape: tuple[int, int], read: TensorReader, grid: Grid) -> QTensor:
        """Codes and scales of a linear of ``shape``; the grid's scale dtype is the one found.

        Raises:
            CheckpointError: a tensor is absent, misshapen or of another dtype.
        """
        weight, scale, *_ = self.specs(module, *shape, grid)
        codes = read_tensors([weight], module, read)["weight"]
        scales = _read_scale(scale, read).view(grid.scale_shape(*shape))
        input_scale = None
        if grid.activations == "static":
            input_scale = _read_scale(_input_spec(module), read).float().view(())
        return QTensor(replace(grid, scale_dtype=scales.dtype), codes, scales, None, input_scale=input_scale)


class FloatLayout(Float8Layout):
    """compressed-tensors' float-quantized: scales by row, block or tensor, and how inputs are quantized beside them."""

    kind = FLOAT_QUANTIZED
    scale_leaf = "weight_scale"

    def grid(self, settings: GridSettings, weight_dtype: torch.dtype) -> Grid:
        """Inputs quantized as they come; one scale a row for group size -1, blocks of 128 x 128 for 128.

        Raises:
            RecipeError: other bits, zero points, or another group size.
        """
        require_eight_bits(settings, "fp8_dynamic")
        if settings.group_size not in (CHANNEL, BLOCK):
            raise RecipeError(
                f"grid.group_size: the fp8_dynamic format has one scale a row ({CHANNEL}) or blocks of {BLOCK}, not "
                f"{settings.group_size}."
            )
        rows = 1 if settings.group_size == CHANNEL else BLOCK
        return Grid(8, settings.group_size, True, weight_dtype, "e4m3", rows, activations="dynamic")

    def describe(self, grid: Grid) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What a config group says of weights and of activations."""
        weights = _arguments(False, **_weight_strategy(grid))
        return weights, _arguments(grid.activations == "dynamic", **_activation_strategy(grid))

    def read(self, group: Mapping[str, Any], weight_dtype: torch.dtype) -> Grid:
        """The grid of a config group.

        Raises:
            CheckpointError: not E4M3 weights by tensor, row or block, with activations to match.
        """
        weights, activations = _parts(group)
        grid = _weight_grid(weights, weight_dtype)
        if grid is not None:
            grid = replace(grid, activations="static" if activations.get("dynamic") is False else "dynamic")
            expected = _arguments(grid.activations == "dynamic", **_activation_strategy(grid))
            if all(activations.get(key) == value for key, value in expected.items()):
                return grid
        raise CheckpointError(
            "config.json: quantization_config is of an FP8 scheme that is not known: "
            f"weights {_shown(weights)}, input_activations {_shown(activations)}.",
            hint="Known are config groups with weights by tensor, channel or block and activations by tensor "
            "(static), token or group (dynamic).",
        )


class MxFloatLayout:
    """compressed-tensors' mxfp8-quantized: powers of two as scales of 32, in weights and inputs."""

    kind = MXFP8_QUANTIZED

    def grid(self, settings: GridSettings, weight_dtype: torch.dtype) -> Grid:
        """The only one.

        Raises:
            RecipeError: other bits, zero points, or another group size.
        """
        require_eight_bits(settings, "mxfp8")
        if settings.group_size != MXFP8.group_size:
            raise RecipeError(f"grid.group_size: the mxfp8 format has groups of 32, not {settings.group_size}.")
        return MXFP8

    def check(self, out_features: int, in_features: int, grid: Grid) -> str | None:
        """Whole groups."""
        if in_features % grid.group_size:
            return f"groups of {grid.group_size} do not divide its {in_features} input features"
        return None

    def specs(self, module: str, out_features: int, in_features: int, grid: Grid) -> list[TensorSpec]:
        """weight, weight_scale."""
        return [
            TensorSpec(f"{module}.weight", torch.float8_e4m3fn, (out_features, in_features)),
            TensorSpec(f"{module}.weight_scale", torch.uint8, (out_features, in_features // grid.group_size)),
        ]

    def pack(self, module: str, weight: QTensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors of :meth:`specs`."""
        yield f"{module}.weight", weight.codes
        yield f"{module}.weight_scale", weight.scales.view(torch.uint8)

    def unpack(self, module: str, shape: tuple[int, int], read: TensorReader, grid: Grid) -> QTensor:
        """Codes and scales of a linear of ``shape``.

        Raises:
            CheckpointError: a tensor is absent or misshapen.
        """
        tensors = read_tensors(self.specs(module, *shape, grid), module, read)
        return QTensor(grid, tensors["weight"], tensors["weight_scale"].view(torch.float8_e8m0fnu), None)

    def describe(self, grid: Grid) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What a config group says of weights and of activations."""
        shared = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
        return _arguments(False, **shared), None if grid.activations == "none" else _arguments(True, **shared)

    def read(self, group: Mapping[str, Any], weight_dtype: torch.dtype) -> Grid:
        """The grid of a config group.

        Raises:
            CheckpointError: not E4M3 weights in groups of 32, with inputs as they are or likewise.
        """
        (weights, inputs), given = _parts(group), group.get("input_activations")
        grid = MXFP8 if given is not None else replace(MXFP8, activations="none")
        described = self.describe(grid)
        for part, expected in zip((weights, inputs), described, strict=True):
            keys = () if expected is None else ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic")
            if any(part.get(key) != (expected or {})[key] for key in keys):
                raise not_read("config_groups", f"of an MXFP8 scheme that is not known: {_shown(part)}")
        return grid


def _input_spec(module: str) -> TensorSpec:
    return TensorSpec(f"{module}.input_scale", torch.float32, (1,))


def _read_scale(spec: TensorSpec, read: TensorReader) -> Tensor:
    tensor = read(spec.name)
    if tuple(tensor.shape) != spec.shape or tensor.dtype not in SCALE_DTYPES:
        raise CheckpointError(f"{spec.name}: {tensor.dtype} {list(tensor.shape)}, not {list(spec.shape)}.")
    return tensor


def require_eight_bits(settings: GridSettings, name: str) -> None:
    """Check that a recipe's grid is one of E4M3 floats.

    Raises:
        RecipeError: other bits, or zero points.
    """
    if settings.bits != 8:
        raise RecipeError(
            f"grid.bits: the {name} format holds 8 bits, not {settings.bits}.", hint="Set grid.bits to 8."
        )
    if settings.symmetric is False:
        raise RecipeError(f"grid.symmetric: the {name} format has no zero points.", hint="Leave it out.")


def _parts(group: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a config group says of weights and activations; empty where it says nothing."""
    weights, activations = (group.get(part) for part in ("weights", "input_activations"))
    return weights if isinstance(weights, dict) else {}, activations if isinstance(activations, dict) else {}


def _arguments(dynamic: bool, **strategy: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": dynamic, **strategy}


def _weight_strategy(grid: Grid) -> dict[str, Any]:
    if grid.group_size != CHANNEL:
        return {"strategy": "block", "group_size": None, "block_structure": [grid.block_rows, grid.group_size]}
    return {"strategy": "tensor" if grid.block_rows == CHANNEL else "channel", "group_size": None}


def _activation_strategy(grid: Grid) -> dict[str, Any]:
    if grid.activations == "static":
        return {"strategy": "tensor", "group_size": None}
    if grid.group_size == CHANNEL:
        return {"strategy": "token", "group_size": None}
    return {"strategy": "group", "group_size": grid.group_size}


def _weight_grid(weights: dict[str, Any], scale_dtype: torch.dtype) -> Grid | None:
    if (weights.get("type"), weights.get("num_bits"), weights.get("symmetric")) != ("float", 8, True):
        return None
    strategy = weights.get("strategy")
    if strategy == "block":
        block = block_sides(weights.get("block_structure"))
        return None if block is None else Grid(8, block[1], True, scale_dtype, "e4m3", block[0])
    if strategy in ("channel", "tensor"):
        return Grid(8, CHANNEL, True, scale_dtype, "e4m3", 1 if strategy == "channel" else CHANNEL)
    return None


def block_sides(value: Any) -> tuple[int, int] | None:
    """Rows and columns of a block as a config.json lists them; None for anything else."""
    if isinstance(value, list) and len(value) == 2 and all(isinstance(side, int) and side > 0 for side in value):
        return value[0], value[1]
    return None


def _shown(arguments: dict[str, Any]) -> str:
    """The telling ones of a config group's arguments."""
    keys = ("num_bits", "type", "symmetric", "strategy", "block_structure", "group_size", "dynamic")
    return repr({key: arguments[key] for key in keys if key in arguments})


FLOATS, MX_FLOATS = FloatLayout(), MxFloatLayout()
