"""AutoAWQ's GEMM layout (``quant_method: awq``), as every AWQ reader understands it.

With K = in_features and N = out_features: ``qweight`` int32 [K, N/8], ``qzeros`` int32 [K/g, N/8], ``scales`` float16
[K/g, N]. Nibble i (bits 4i) of word c holds column ``8c + ORDER[i]``; W[n, k] = (q - z) * s. ``zero_point: false``,
GPTQModel's default, says how they were chosen: ``qzeros`` is stored, and read, all the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qconv.checkpoint.header import TensorSpec
from qconv.core.architecture import HEAD
from qconv.core.qtensor import CHANNEL, Grid, Number, QTensor
from qconv.core.settings import GridSettings
from qconv.errors import CheckpointError, RecipeError
from qconv.formats.base import (
    AllInConfig,
    Described,
    Group,
    TensorReader,
    by_rows,
    read_tensors,
    require_number,
    skip_list,
)

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of a word's eight columns each nibble holds, lowest nibble first."""
_EXPERTS = re.compile(r".+\.experts(?=\.\d+\.)")


def pack_rows(values: Tensor) -> Tensor:
    """Pack every eight rows of 4-bit values, uint8 [8n, columns], to one of int32 [n, columns], in AWQ's order."""
    rows, columns = values.shape
    of_word = values.view(rows // 8, 8, columns)
    words = of_word[:, ORDER[0]].to(torch.int32)
    for nibble, row in enumerate(ORDER[1:], 1):
        words |= of_word[:, row].to(torch.int32) << (4 * nibble)
    return words


def unpack_rows(words: Tensor) -> Tensor:
    """The inverse of :func:`pack_rows`: int32 [n, columns] to uint8 [8n, columns]."""
    rows, columns = words.shape
    words = words.contiguous()
    values = torch.empty(rows, 8, columns, dtype=torch.uint8, device=words.device)
    for nibble, row in enumerate(ORDER):
        values[:, row] = (words >> (4 * nibble)) & 15
    return values.view(8 * rows, columns)


def pack_words(values: Tensor) -> Tensor:
    """Pack along rows: 4-bit values, uint8 [rows, columns], to int32 [rows, columns/8] in AWQ's nibble order."""
    return pack_rows(values.t().contiguous()).t().contiguous()


def unpack_words(words: Tensor) -> Tensor:
    """The inverse of :func:`pack_words`: int32 [rows, words] to uint8 [rows, 8 words]."""
    return unpack_rows(words.t()).t().contiguous()


class AwqFormat(AllInConfig):
    """AutoAWQ GEMM, 4 bits, with zero points."""

    name = "awq"
    pack_columns = 8
    act_order = False
    mixes = False

    def grid(self, settings: GridSettings, weight_dtype: torch.dtype, number: Number | None = None) -> Grid:
        """4 bits, asymmetric, float16 scales.

        Raises:
            RecipeError: other bits, a symmetric grid, or one scale a row.
        """
        require_number(number, "int", self.name)
        if settings.bits != 4:
            raise RecipeError(f"grid.bits: the awq format holds 4 bits, not {settings.bits}.")
        if settings.symmetric:
            raise RecipeError("grid.symmetric: the awq format always has zero points.", hint="Take format w4a16.")
        if settings.group_size == -1:
            raise RecipeError("grid.group_size: the awq format needs groups.", hint="Take 32, 64 or 128.")
        return Grid(4, settings.group_size, symmetric=False, scale_dtype=torch.float16)

    def check(self, out_features: int, in_features: int, grid: Grid) -> str | None:
        """Whole words need 8 | out_features; whole groups need group_size | in_features."""
        if grid.group_size != CHANNEL and in_features % grid.group_size:
            return f"group size {grid.group_size} does not divide its {in_features} input features"
        if out_features % 8:
            return f"its {out_features} output features are not a multiple of 8"
        return None

    def specs(self, module: str, out_features: int, in_features: int, grid: Grid) -> list[TensorSpec]:
        """qweight, qzeros, scales."""
        groups = grid.groups(in_features)
        return [
            TensorSpec(f"{module}.qweight", torch.int32, (in_features, out_features // 8)),
            TensorSpec(f"{module}.qzeros", torch.int32, (groups, out_features // 8)),
            TensorSpec(f"{module}.scales", grid.scale_dtype, (groups, out_features)),
        ]

    def pack(self, module: str, weight: QTensor) -> Iterator[tuple[str, Tensor]]:
        """qweight, qzeros, scales."""
        assert weight.zero_points is not None
        yield f"{module}.qweight", by_rows(pack_rows, weight.codes, transposed=True)
        yield f"{module}.qzeros", pack_words(weight.zero_points.t())
        yield f"{module}.scales", weight.scales.t().contiguous()

    def unpack(self, module: str, shape: tuple[int, int], read: TensorReader, grid: Grid) -> QTensor:
        """Codes, scales and zero points of a linear of ``shape``.

        Raises:
            CheckpointError: a tensor is absent or misshapen.
        """
        tensors = read_tensors(self.specs(module, *shape, grid), module, read)
        return QTensor(
            grid,
            by_rows(unpack_rows, tensors["qweight"].t(), growth=8),
            tensors["scales"].t().contiguous(),
            unpack_words(tensors["qzeros"]).t().contiguous(),
        )

    def config(self, quantized: Mapping[Grid, Sequence[str]], skipped: Sequence[str]) -> dict[str, Any]:
        """AutoAWQ's own keys; readers match ``modules_to_not_convert`` by substring.

        AutoAWQ matches against names relative to a layer, engines against full names, so both forms are listed: the
        relative one only where it is no part of a quantized linear's name (``mlp.gate`` is part of ``mlp.gate_proj``).
        """
        ((grid, names),) = quantized.items()
        relative = {name.split(".", 3)[3] for name in skipped if name.startswith("model.layers.")}
        # Engines ask for a layer's experts as one module.
        experts = dict.fromkeys(found[0] for found in map(_EXPERTS.match, skipped) if found is not None)
        whole = [name for name in experts if not any(other.startswith(f"{name}.") for other in names)]
        safe = sorted(name for name in relative if not any(name in other for other in names))
        return {
            "quant_method": "awq",
            "bits": grid.bits,
            "group_size": grid.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": [*safe, *skipped, *whole],
        }

    def recognizes(self, section: dict[str, Any]) -> bool:
        """``quant_method`` is awq."""
        return section.get("quant_method") == "awq"

    def read_config(self, section: dict[str, Any], weight_dtype: torch.dtype) -> Described:
        """Grid and skipped modules.

        Raises:
            CheckpointError: not the GEMM version, or not 4 bits.
        """
        # AutoAWQ's own file beside config.json says w_bit and q_group_size, and GEMM.
        bits, version = section.get("bits", section.get("w_bit")), str(section.get("version", "gemm")).lower()
        if version != "gemm" or bits != 4:
            raise CheckpointError(
                f"config.json: quantization_config says AWQ of version {version!r} with {bits!r} bits.",
                hint="AWQ is read in version gemm with 4 bits: save it so, or quantize the original model.",
            )
        group_size = section.get("group_size", section.get("q_group_size"))
        if not isinstance(group_size, int) or (group_size < 1 and group_size != CHANNEL):
            raise CheckpointError(
                f"config.json: quantization_config.group_size is {group_size!r}, neither a positive integer nor "
                f"{CHANNEL} for a whole row.",
                hint="Repair config.json.",
            )
        group = Group(Grid(4, group_size, False, torch.float16))
        return Described((group,), tuple(skip_list(section, "modules_to_not_convert")))

    def is_skipped(self, module: str, skipped: Sequence[str]) -> bool:
        """Substring match; the head is nobody's to quantize, listed or not."""
        return module == HEAD or any(entry in module for entry in skipped)


FORMAT = AwqFormat()
