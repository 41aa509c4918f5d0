"""compressed-tensors' ``float-quantized`` layout with static activations: one scale a weight, one for its inputs.

``weight`` F8_E4M3 [out, in], ``weight_scale`` [1] in the weight's dtype, ``input_scale`` float32 [1]: what engines
divide a linear's inputs by, from calibration.
"""

from __future__ import annotations

from typing import Any

import torch

from qconv.core.qtensor import CHANNEL, Grid, Number
from qconv.core.settings import GridSettings
from qconv.errors import RecipeError
from qconv.formats.base import require_number
from qconv.formats.compressed_tensors import CompressedTensors, is_of_kind, is_static
from qconv.formats.float8 import FLOAT_QUANTIZED, require_eight_bits


class Fp8StaticFormat(CompressedTensors):
    """FP8 weights and activations, one stored scale for each."""

    name = "fp8_static"
    number = "e4m3"
    mixes = False

    def grid(self, settings: GridSettings, weight_dtype: torch.dtype, number: Number | None = None) -> Grid:
        """One scale for the whole weight.

        Raises:
            RecipeError: other bits, zero points, or groups.
        """
        require_number(number, self.number, self.name)
        require_eight_bits(settings, self.name)
        if settings.group_size != CHANNEL:
            raise RecipeError(
                f"grid.group_size: the fp8_static format has one scale a weight ({CHANNEL}), not {settings.group_size}."
            )
        return Grid(8, CHANNEL, True, weight_dtype, "e4m3", CHANNEL, activations="static")

    def recognizes(self, section: dict[str, Any]) -> bool:
        """compressed-tensors' float-quantized with static activations."""
        return is_of_kind(section, FLOAT_QUANTIZED) and is_static(section)


FORMAT = Fp8StaticFormat()
