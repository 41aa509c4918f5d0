"""compressed-tensors' layouts of E2M1 floats, ``nvfp4-pack-quantized`` and ``mxfp4-pack-quantized``.

``weight_packed`` is uint8 [out, in/2], two codes in a byte, the even column in its lower half. NVFP4 has
``weight_scale`` F8_E4M3 [out, in/16] and ``weight_global_scale`` float32 [1], which divides: a weight is
``code * (weight_scale / weight_global_scale)``. Where engines round inputs to NVFP4 too, ``input_global_scale`` float32
[1] stands beside it, 2688 over the largest input: what the scales of their groups are multiplied by. MXFP4 has
``weight_scale`` uint8 [out, in/32], E8M0: exponents of two plus 127.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from qconv.checkpoint.header import TensorSpec
from qconv.core.qtensor import Grid, QTensor
from qconv.core.settings import GridSettings
from qconv.errors import CheckpointError, RecipeError
from qconv.formats.base import TensorReader, by_rows, pack_pairs, read_tensors, unpack_pairs
from qconv.formats.packed import not_read

NVFP4_PACKED, MXFP4_PACKED = "nvfp4-pack-quantized", "mxfp4-pack-quantized"
NVFP4 = Grid(4, 16, True, torch.float8_e4m3fn, "e2m1")
MXFP4 = Grid(4, 32, True, torch.float8_e8m0fnu, "e2m1")
"""The grids, where inputs stay as they are."""


def fp4_grid(grid: Grid, settings: GridSettings, name: str) -> Grid:
    """The grid, if a recipe's settings are those of it.

    Raises:
        RecipeError: they are not; names the key.
    """
    given = (("bits", settings.bits, grid.bits), ("group_size", settings.group_size, grid.group_size))
    for key, value, own in given:
        if value != own:
            raise RecipeError(f"grid.{key}: {name} has {own}, not {value}.", hint=f"Set grid.{key} to {own}.")
    if settings.symmetric is False:
        raise RecipeError(f"grid.symmetric: {name} has no zero points.", hint="Leave it out.")
    return grid


def misfit(in_features: int, grid: Grid) -> str | None:
    """Why a row of so many inputs is not made of whole groups, or None."""
    if in_features % grid.group_size:
        return f"groups of {grid.group_size} do not divide its {in_features} input features"
    return None


def reciprocal_of(tensor: Tensor, name: str) -> float:
    """What multiplies where a file holds what divides, or the other way round.

    Raises:
        CheckpointError: it is no positive number.
    """
    return 1.0 / positive(tensor, name)


def positive(tensor: Tensor, name: str) -> float:
    """A scale that is one number.

    Raises:
        CheckpointError: it is not one positive number.
    """
    value = float(tensor) if tensor.numel() == 1 else 0.0
    if not 0.0 < value < float("inf"):
        raise CheckpointError(
            f"{name}: is not one positive number.", hint="The build is damaged, or was saved before it was quantized."
        )
    return value


class _PairsLayout:
    """What the two have in common."""

    kind: str
    own: Grid

    def grid(self, settings: GridSettings, weight_dtype: torch.dtype) -> Grid:
        """The only one.

        Raises:
            RecipeError: the settings are of another.
        """
        return fp4_grid(self.own, settings, self.kind)

    def check(self, out_features: int, in_features: int, grid: Grid) -> str | None:
        """Whole groups."""
        return misfit(in_features, grid)

    def describe(self, grid: Grid) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What a config group says of weights and of activations."""
        dynamic = {"none": None, "local": "local", "dynamic": True}[grid.activations]
        return self._arguments(False), None if dynamic is None else self._arguments(dynamic)

    def _arguments(self, dynamic: bool | str) -> dict[str, Any]:
        nvfp4 = self.own.has_global_scale
        return {
            "num_bits": 4,
            "type": "float",
            "symmetric": True,
            "strategy": "tensor_group" if nvfp4 else "group",
            "group_size": self.own.group_size,
            "dynamic": dynamic,
            "scale_dtype": "torch.float8_e4m3fn" if nvfp4 else "torch.uint8",
        }

    def read(self, group: Mapping[str, Any], weight_dtype: torch.dtype) -> Grid:
        """The grid of a config group.

        Raises:
            CheckpointError: weights or activations of a kind that is not read.
        """
        weights, inputs = group.get("weights"), group.get("input_activations")
        if not isinstance(weights, dict) or self._differs(weights):
            raise not_read("weights", f"no {self.kind} that is read: {self._differs(weights)}")
        if inputs is None:
            return self.own
        wanted = "local" if self.own.has_global_scale else True
        if not isinstance(inputs, dict) or self._differs(inputs) or inputs.get("dynamic") != wanted:
            raise not_read("input_activations", "not those of its weights, or have no range of their own")
        kept: Literal["local", "dynamic"] = "local" if self.own.has_global_scale else "dynamic"
        return replace(self.own, activations=kept, activation_number="e2m1")

    def _differs(self, arguments: Any) -> str:
        """What makes arguments those of another kind; nothing where none does."""
        if not isinstance(arguments, dict):
            return "nothing is said of them"
        keys = ("num_bits", "type", "symmetric", "strategy", "group_size")
        own = self._arguments(False)
        return ", ".join(f"{key} {arguments.get(key)!r}" for key in keys if arguments.get(key, own[key]) != own[key])


class Nvfp4Layout(_PairsLayout):
    """E4M3 scales of 16, and one for all of them."""

    kind, own = NVFP4_PACKED, NVFP4

    def specs(self, module: str, out_features: int, in_features: int, grid: Grid) -> list[TensorSpec]:
        """weight_packed, weight_scale, weight_global_scale, input_global_scale (local activations)."""
        specs = [
            TensorSpec(f"{module}.weight_packed", torch.uint8, (out_features, in_features // 2)),
            TensorSpec(f"{module}.weight_scale", torch.float8_e4m3fn, (out_features, in_features // 16)),
            TensorSpec(f"{module}.weight_global_scale", torch.float32, (1,)),
        ]
        if grid.stores_inputs:
            specs.append(TensorSpec(f"{module}.input_global_scale", torch.float32, (1,)))
        return specs

    def pack(self, module: str, weight: QTensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors of :meth:`specs`."""
        yield f"{module}.weight_packed", by_rows(pack_pairs, weight.codes)
        yield f"{module}.weight_scale", weight.scales
        yield f"{module}.weight_global_scale", torch.tensor([1.0 / weight.global_scale], dtype=torch.float32)
        if weight.grid.stores_inputs:
            if weight.input_scale is None:
                raise ValueError(f"{module}: local activations need an input scale")
            yield f"{module}.input_global_scale", weight.input_scale.double().reciprocal().float().view(1)

    def unpack(self, module: str, shape: tuple[int, int], read: TensorReader, grid: Grid) -> QTensor:
        """Codes and scales of a linear of ``shape``.

        Raises:
            CheckpointError: a tensor is absent or misshapen, or a scale of all is no positive number.
        """
        tensors = read_tensors(self.specs(module, *shape, grid), module, read)
        shared = reciprocal_of(tensors["weight_global_scale"], f"{module}.weight_global_scale")
        inputs = None
        if grid.stores_inputs:
            scale = reciprocal_of(tensors["input_global_scale"], f"{module}.input_global_scale")
            inputs = torch.tensor(scale, dtype=torch.float64)
        codes = by_rows(unpack_pairs, tensors["weight_packed"], growth=2)
        return QTensor(grid, codes, tensors["weight_scale"], None, input_scale=inputs, global_scale=shared)


class Mxfp4Layout(_PairsLayout):
    """Powers of two as scales of 32."""

    kind, own = MXFP4_PACKED, MXFP4

    def specs(self, module: str, out_features: int, in_features: int, grid: Grid) -> list[TensorSpec]:
        """weight_packed, weight_scale."""
        return [
            TensorSpec(f"{module}.weight_packed", torch.uint8, (out_features, in_features // 2)),
            TensorSpec(f"{module}.weight_scale", torch.uint8, (out_features, in_features // 32)),
        ]

    def pack(self, module: str, weight: QTensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors of :meth:`specs`."""
        yield f"{module}.weight_packed", by_rows(pack_pairs, weight.codes)
        yield f"{module}.weight_scale", weight.scales.view(torch.uint8)

    def unpack(self, module: str, shape: tuple[int, int], read: TensorReader, grid: Grid) -> QTensor:
        """Codes and scales of a linear of ``shape``.

        Raises:
            CheckpointError: a tensor is absent or misshapen.
        """
        tensors = read_tensors(self.specs(module, *shape, grid), module, read)
        codes = by_rows(unpack_pairs, tensors["weight_packed"], growth=2)
        return QTensor(grid, codes, tensors["weight_scale"].view(torch.float8_e8m0fnu), None)


NVFP4_PAIRS, MXFP4_PAIRS = Nvfp4Layout(), Mxfp4Layout()
