"""compressed-tensors' ``nvfp4-pack-quantized`` whose inputs are rounded to NVFP4 too: W4A4.

``input_global_scale`` comes from calibration, one for all linears that share an input.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from qconv.core.qtensor import Grid, Number
from qconv.core.settings import GridSettings
from qconv.formats.compressed_tensors import CompressedTensors, is_of_kind, rounds_inputs
from qconv.formats.float4 import NVFP4_PACKED


class Nvfp4W4A4Format(CompressedTensors):
    """NVFP4 weights and inputs."""

    name = "nvfp4_w4a4"
    number = "e2m1"

    def grid(self, settings: GridSettings, weight_dtype: torch.dtype, number: Number | None = None) -> Grid:
        """As of compressed-tensors' others, with inputs rounded where weights are NVFP4.

        Raises:
            RecipeError: no layout can express the settings.
        """
        grid = super().grid(settings, weight_dtype, number)
        return replace(grid, activations="local", activation_number="e2m1") if grid.has_global_scale else grid

    def recognizes(self, section: dict[str, Any]) -> bool:
        """compressed-tensors' NVFP4 with rounded inputs."""
        return is_of_kind(section, NVFP4_PACKED) and rounds_inputs(section)


FORMAT = Nvfp4W4A4Format()
