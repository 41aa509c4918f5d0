"""compressed-tensors' ``mxfp4-pack-quantized`` with 16-bit activations; builds that round inputs too are read."""

from __future__ import annotations

from typing import Any

from qconv.formats.compressed_tensors import CompressedTensors, is_of_kind
from qconv.formats.float4 import MXFP4_PACKED


class Mxfp4Format(CompressedTensors):
    """MXFP4 weights."""

    name = "mxfp4"
    number = "e2m1"
    microscaling = True

    def recognizes(self, section: dict[str, Any]) -> bool:
        """compressed-tensors' MXFP4."""
        return is_of_kind(section, MXFP4_PACKED)


FORMAT = Mxfp4Format()
