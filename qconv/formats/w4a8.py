"""compressed-tensors' W4AFP8: ``pack-quantized`` int4 in groups of 128, inputs rounded to E4M3 by each token's range.

The tensors are those of :mod:`qconv.formats.w4a16`; no scale of inputs is stored.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from qconv.core.qtensor import Grid, Number
from qconv.core.settings import GridSettings
from qconv.errors import RecipeError
from qconv.formats.compressed_tensors import CompressedTensors, bits_and_inputs, is_of_kind
from qconv.formats.packed import PACK_QUANTIZED

GROUP_SIZE = 128
"""What the kernels of vLLM and SGLang are made for; SGLang computes with other scales where groups are of another size
(sglang issue 38573)."""


class W4A8Format(CompressedTensors):
    """int4 in groups of 128, inputs quantized as they come; by rules also FP8."""

    name = "w4a8"
    number = "int"

    def grid(self, settings: GridSettings, weight_dtype: torch.dtype, number: Number | None = None) -> Grid:
        """Groups of 128 without zero points.

        Raises:
            RecipeError: other bits, zero points, or other groups.
        """
        found = super().grid(settings, weight_dtype, number)
        if found.is_float:
            return found
        if found.bits != 4:
            raise RecipeError(f"grid.bits: the w4a8 format holds 4 bits, not {found.bits}.", hint="Take --fmt w8a8.")
        if not found.symmetric:
            raise RecipeError("grid.symmetric: the w4a8 format has no zero points.", hint="Leave it out.")
        if found.group_size != GROUP_SIZE:
            raise RecipeError(
                f"grid.group_size: the w4a8 format has groups of {GROUP_SIZE}, not {found.group_size}: SGLang loads "
                "others and computes with wrong scales.",
                hint="Take --fmt w4a16, whose inputs are left as they are, or fp8-channel in a rule for some linears.",
            )
        return replace(found, activations="dynamic", activation_number="e4m3")

    def recognizes(self, section: dict[str, Any]) -> bool:
        """compressed-tensors in its pack-quantized format, with all inputs rounded to E4M3 by token."""
        return is_of_kind(section, PACK_QUANTIZED) and bits_and_inputs(section) == {(4, "e4m3")}


FORMAT = W4A8Format()
