"""What a format must be able to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from qconv.checkpoint.header import TensorSpec
from qconv.core.qtensor import Grid, QTensor
from qconv.core.settings import GridSettings
from qconv.errors import CheckpointError

TensorReader = Callable[[str], Tensor]
"""Gives a tensor by its full name."""


def skip_list(section: dict[str, Any], key: str) -> list[str]:
    """The names under ``key`` of a ``quantization_config``; empty if absent or null.

    Raises:
        CheckpointError: not a list of names.
    """
    value = section.get(key) or []
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise CheckpointError(f"config.json: quantization_config.{key} is not a list of names.")
    return value


def read_tensors(specs: Sequence[TensorSpec], module: str, read: TensorReader) -> dict[str, Tensor]:
    """The tensors of ``specs`` by the part of their name that follows the module's.

    Raises:
        CheckpointError: one is absent or has another shape or dtype than its spec.
    """
    tensors: dict[str, Tensor] = {}
    for spec in specs:
        tensor = read(spec.name)
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
            raise CheckpointError(f"{spec.name}: {tensor.dtype} {list(tensor.shape)}, not {list(spec.shape)}.")
        tensors[spec.name.removeprefix(f"{module}.")] = tensor
    return tensors


_BLOCK_ELEMENTS = 1 << 20
_BLOCK_MULTIPLE = 32


def by_rows(
    convert: Callable[[Tensor], Tensor], values: Tensor, *, growth: int = 1, transposed: bool = False
) -> Tensor:
    """``convert(values)``, a few rows at a time, so that its intermediate values never take the memory of all rows.

    Args:
        convert: From rows [n, columns] to rows [n * k, others], each from rows of its own; n is a multiple of 32, but
            for the last rows.
        values: [rows, columns], of any strides; ``convert`` gets blocks that have them too.
        growth: How many elements come of one.
        transposed: Return [others, rows * k].
    """
    rows, columns = values.shape
    step = max(1, _BLOCK_ELEMENTS // (max(1, columns) * growth * _BLOCK_MULTIPLE)) * _BLOCK_MULTIPLE
    out, done = values.new_empty(0), 0
    for start in range(0, max(1, rows), step):
        block = convert(values[start : start + step])
        if start == 0:
            total = len(block) * rows // max(1, min(step, rows))
            shape = (total, block.shape[1])
            out = block.new_empty(shape[::-1]).t() if transposed else block.new_empty(shape)
        out[done : done + len(block)] = block
        done += len(block)
    return out.t() if transposed else out


class Format(Protocol):
    """Pack, unpack and describe quantized linears. Formats know no calibration."""

    name: str
    """Registry key."""
    pack_columns: int
    """Output features that one packed word holds; a tensor-parallel rank must own whole words."""
    act_order: bool
    """Whether it can say which group each input belongs to."""

    def grid(self, settings: GridSettings, weight_dtype: torch.dtype) -> Grid:
        """The grid for a recipe's settings.

        Raises:
            RecipeError: the format cannot express the settings.
        """

    def check(self, out_features: int, in_features: int, grid: Grid) -> str | None:
        """Why a linear of that shape cannot be stored, or None."""

    def specs(self, module: str, out_features: int, in_features: int, grid: Grid) -> list[TensorSpec]:
        """The tensors that hold a quantized linear, in file order, bias not included."""

    def pack(self, module: str, weight: QTensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors of ``specs`` with their names, in the same order."""

    def unpack(self, module: str, shape: tuple[int, int], read: TensorReader, grid: Grid) -> QTensor:
        """The QTensor of a linear of ``shape`` (out_features, in_features), from the file's tensors.

        Raises:
            CheckpointError: a tensor is absent or has another shape or dtype than the format says.
        """

    def config(self, grid: Grid, skipped: Sequence[str], quantized: Sequence[str]) -> dict[str, Any]:
        """The ``quantization_config`` of config.json, from the linears left alone and those quantized, by name."""

    def recognizes(self, section: dict[str, Any]) -> bool:
        """Whether a ``quantization_config`` is of this format."""

    def read_config(self, section: dict[str, Any], weight_dtype: torch.dtype) -> tuple[Grid, list[str]]:
        """Grid and skipped modules from a ``quantization_config``.

        Raises:
            CheckpointError: a key is missing or has an unsupported value.
        """

    def is_skipped(self, module: str, skipped: Sequence[str]) -> bool:
        """Whether readers of this format leave ``module`` unquantized, by their own matching rule."""
