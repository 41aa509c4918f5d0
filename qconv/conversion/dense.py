"""Weights as plain numbers of 16 or 32 bits: the layout of a checkpoint that nobody quantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qconv.checkpoint.header import TensorSpec
from qconv.core.qtensor import Grid, Number, QTensor
from qconv.core.settings import GridSettings
from qconv.errors import RecipeError
from qconv.formats.base import Described, EachItsOwn, TensorReader
from qconv.formats.cache import CacheNaming

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
"""By the names that ``--to`` takes."""


class DenseFormat(EachItsOwn):
    """A format that holds no grid; what a plan asks of one."""

    pack_columns = 1
    act_order = False
    mixes = True
    beside_names: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        """Of one of :data:`DTYPES`."""
        self.name = name

    @property
    def cache(self) -> CacheNaming | None:
        """No scales of a cache."""
        return None

    def grid(self, settings: GridSettings, weight_dtype: torch.dtype, number: Number | None = None) -> Grid:
        """None.

        Raises:
            RecipeError: always.
        """
        raise RecipeError(f"format: {self.name} holds no codes.")

    def check(self, out_features: int, in_features: int, grid: Grid) -> str | None:
        """Why a linear on a grid cannot be stored."""
        return "plain weights have no grid"

    def specs(self, module: str, out_features: int, in_features: int, grid: Grid) -> list[TensorSpec]:
        """Of no linear."""
        return []

    def pack(self, module: str, weight: QTensor) -> Iterator[tuple[str, Tensor]]:
        """Nothing."""
        return iter(())

    def unpack(self, module: str, shape: tuple[int, int], read: TensorReader, grid: Grid) -> QTensor:
        """Nothing.

        Raises:
            RecipeError: always.
        """
        raise RecipeError(f"format: {self.name} holds no codes.")

    def config(self, quantized: Mapping[Grid, Sequence[str]], skipped: Sequence[str]) -> dict[str, Any]:
        """No words: config.json gets no ``quantization_config``."""
        return {}

    def beside(self, section: Mapping[str, Any]) -> dict[str, Any]:
        """No file."""
        return {}

    def recognizes(self, section: dict[str, Any]) -> bool:
        """No words are its own."""
        return False

    def read_config(self, section: dict[str, Any], weight_dtype: torch.dtype) -> Described:
        """Nothing.

        Raises:
            RecipeError: always.
        """
        raise RecipeError(f"format: {self.name} has no words.")

    def is_skipped(self, module: str, skipped: Sequence[str]) -> bool:
        """Every linear is plain."""
        return True
