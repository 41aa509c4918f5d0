"""compressed-tensors' ``nvfp4-pack-quantized`` with 16-bit activations: W4A16; by rules also what its others hold."""

from __future__ import annotations

from typing import Any

from qconv.formats.compressed_tensors import CompressedTensors, is_of_kind, rounds_inputs
from qconv.formats.float4 import NVFP4_PACKED


class Nvfp4Format(CompressedTensors):
    """NVFP4 weights."""

    name = "nvfp4"
    number = "e2m1"

    def recognizes(self, section: dict[str, Any]) -> bool:
        """compressed-tensors' NVFP4 that leaves inputs as they are."""
        return is_of_kind(section, NVFP4_PACKED) and not rounds_inputs(section)


FORMAT = Nvfp4Format()
