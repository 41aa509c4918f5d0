"""compressed-tensors' ``mxfp8-quantized``: E4M3 weights with powers of two as scales of 32, inputs rounded likewise."""

from __future__ import annotations

from typing import Any

from qconv.formats.compressed_tensors import CompressedTensors, is_of_kind
from qconv.formats.float8 import MXFP8_QUANTIZED


class Mxfp8Format(CompressedTensors):
    """MXFP8 weights."""

    name = "mxfp8"
    number = "e4m3"
    microscaling = True

    def recognizes(self, section: dict[str, Any]) -> bool:
        """compressed-tensors' MXFP8."""
        return is_of_kind(section, MXFP8_QUANTIZED)


FORMAT = Mxfp8Format()
