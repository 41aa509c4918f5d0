"""compressed-tensors' ``float-quantized`` layout with dynamic activations, by row or in blocks of 128 x 128.

``weight`` F8_E4M3 [out, in] and ``weight_scale`` in the weight's dtype: [out, 1], where engines quantize each token's
inputs by their own range, or [ceil(out/128), ceil(in/128)], where they do so by groups of 128.
"""

from __future__ import annotations

from typing import Any

import torch

from qconv.core.qtensor import CHANNEL, Grid
from qconv.core.settings import GridSettings
from qconv.errors import RecipeError
from qconv.formats.float8 import BLOCK, CompressedFloat8, is_float_quantized, is_static, require_eight_bits


class Fp8DynamicFormat(CompressedFloat8):
    """FP8 weights with scales by row or block, activations quantized as they come."""

    name = "fp8_dynamic"

    def grid(self, settings: GridSettings, weight_dtype: torch.dtype) -> Grid:
        """One scale a row for group size -1, blocks of 128 x 128 for 128.

        Raises:
            RecipeError: other bits, zero points, or another group size.
        """
        require_eight_bits(settings, self.name)
        if settings.group_size not in (CHANNEL, BLOCK):
            raise RecipeError(
                f"grid.group_size: the fp8_dynamic format has one scale a row ({CHANNEL}) or blocks of {BLOCK}, not "
                f"{settings.group_size}."
            )
        rows = 1 if settings.group_size == CHANNEL else BLOCK
        return Grid(8, settings.group_size, True, weight_dtype, "e4m3", rows, activations="dynamic")

    def recognizes(self, section: dict[str, Any]) -> bool:
        """compressed-tensors' float-quantized, unless its activations are static."""
        return is_float_quantized(section) and not is_static(section)


FORMAT = Fp8DynamicFormat()
