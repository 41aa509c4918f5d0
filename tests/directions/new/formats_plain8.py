"""Codes of 8 bits as bytes, a 16-bit scale for each group: a format as simple as one can be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qconv.checkpoint.header import TensorSpec
from qconv.core.architecture import HEAD
from qconv.core.qtensor import Grid, Number, QTensor
from qconv.core.settings import GridSettings
from qconv.errors import RecipeError
from qconv.formats.base import AllInConfig, Described, Group, TensorReader, read_tensors, require_number, skip_list


class Plain8Format(AllInConfig):
    """Symmetric, 8 bits."""

    name = "plain8"
    pack_columns = 1
    act_order = False
    mixes = False

    def grid(self, settings: GridSettings, weight_dtype: torch.dtype, number: Number | None = None) -> Grid:
        """See :class:`qconv.formats.base.Format`."""
        require_number(number, "int", self.name)
        if settings.bits != 8:
            raise RecipeError("grid.bits: the plain8 format holds 8 bits.")
        return Grid(8, settings.group_size, True, weight_dtype)

    def check(self, out_features: int, in_features: int, grid: Grid) -> str | None:
        """Whole groups."""
        return None if in_features % grid.group_size == 0 else "groups do not divide its rows"

    def specs(self, module: str, out_features: int, in_features: int, grid: Grid) -> list[TensorSpec]:
        """codes, steps."""
        return [
            TensorSpec(f"{module}.codes", torch.uint8, (out_features, in_features)),
            TensorSpec(f"{module}.steps", grid.scale_dtype, (out_features, grid.groups(in_features))),
        ]

    def pack(self, module: str, weight: QTensor) -> Iterator[tuple[str, Tensor]]:
        """As they are."""
        yield f"{module}.codes", weight.codes
        yield f"{module}.steps", weight.scales

    def unpack(self, module: str, shape: tuple[int, int], read: TensorReader, grid: Grid) -> QTensor:
        """As they are."""
        tensors = read_tensors(self.specs(module, *shape, grid), module, read)
        return QTensor(grid, tensors["codes"], tensors["steps"], None)

    def config(self, quantized: Mapping[Grid, Sequence[str]], skipped: Sequence[str]) -> dict[str, Any]:
        """Its keys."""
        ((grid, _),) = quantized.items()
        return {"quant_method": self.name, "group_size": grid.group_size, "left": [*skipped]}

    def recognizes(self, section: dict[str, Any]) -> bool:
        """By its name."""
        return section.get("quant_method") == self.name

    def read_config(self, section: dict[str, Any], weight_dtype: torch.dtype) -> Described:
        """Its keys."""
        grid = Grid(8, int(section["group_size"]), True, weight_dtype)
        return Described((Group(grid),), tuple(skip_list(section, "left")))

    def is_skipped(self, module: str, skipped: Sequence[str]) -> bool:
        """By whole names."""
        return module == HEAD or module in skipped


FORMAT = Plain8Format()
