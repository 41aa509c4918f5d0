"""compressed-tensors' ``int-quantized`` W8A8: int8 weights, and inputs rounded to int8 by each token's own range.

``weight`` int8 [out, in] and ``weight_scale`` [out, 1] in the weight's dtype; no scale of inputs is stored.
"""

from __future__ import annotations

from typing import Any

import torch

from qconv.core.qtensor import CHANNEL, Grid, Number
from qconv.core.settings import GridSettings
from qconv.errors import RecipeError
from qconv.formats.compressed_tensors import CompressedTensors, bits_and_inputs, is_of_kind
from qconv.formats.packed import INT_QUANTIZED, WholeNumberGrid


class W8A8Format(CompressedTensors):
    """int8 by row, inputs quantized as they come; by rules also FP8."""

    name = "w8a8"
    number = "int"

    def grid(self, settings: GridSettings, weight_dtype: torch.dtype, number: Number | None = None) -> Grid:
        """One scale a row.

        Raises:
            RecipeError: other bits, zero points, or groups.
        """
        if number not in (None, "int"):
            return super().grid(settings, weight_dtype, number)
        if settings.bits != 8:
            raise RecipeError(f"grid.bits: the w8a8 format holds 8 bits, not {settings.bits}.", hint="Take --fmt w4a8.")
        if settings.symmetric is False:
            raise RecipeError("grid.symmetric: the w8a8 format has no zero points.", hint="Leave it out.")
        if settings.group_size != CHANNEL:
            raise RecipeError(
                f"grid.group_size: the w8a8 format has one scale a row ({CHANNEL}), not {settings.group_size}.",
                hint="Take --fmt w4a16 for 8 bits in groups, whose inputs are left as they are.",
            )
        return WholeNumberGrid(8, CHANNEL, True, weight_dtype, activations="dynamic", activation_number="int")

    def recognizes(self, section: dict[str, Any]) -> bool:
        """compressed-tensors in its int-quantized format, with inputs rounded to integers by token."""
        return is_of_kind(section, INT_QUANTIZED) and bits_and_inputs(section) == {(8, "int")}


class IntQuantizedFormat(CompressedTensors):
    """int8 weights whose inputs are left alone, or rounded in a way of their own, and int4 ones; read alone."""

    name = "int_quantized"
    number = "int"

    def recognizes(self, section: dict[str, Any]) -> bool:
        """compressed-tensors in its int-quantized format."""
        return is_of_kind(section, INT_QUANTIZED)


FORMAT = W8A8Format()
READ_ALONE = (IntQuantizedFormat(),)
