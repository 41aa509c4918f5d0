"""compressed-tensors' integers: ``pack-quantized`` weights, 16-bit activations, symmetric by default."""

from __future__ import annotations

from typing import Any

from qconv.formats.compressed_tensors import MIXED_PRECISION, CompressedTensors, bits_and_inputs, is_of_kind
from qconv.formats.packed import PACK_QUANTIZED


class PackQuantizedFormat(CompressedTensors):
    """compressed-tensors pack-quantized with 4 or 8 bits; by rules also with FP8."""

    name = "w4a16"
    number = "int"

    def recognizes(self, section: dict[str, Any]) -> bool:
        """compressed-tensors in its pack-quantized format, unless all inputs are rounded, too."""
        return is_of_kind(section, PACK_QUANTIZED) and bits_and_inputs(section) != {(4, "e4m3")}


class MixedPrecisionFormat(CompressedTensors):
    """compressed-tensors ``mixed-precision``: what :class:`PackQuantizedFormat` becomes where layouts are mixed."""

    name = "mixed_precision"
    number = "int"

    def recognizes(self, section: dict[str, Any]) -> bool:
        """compressed-tensors in its mixed-precision format."""
        return is_of_kind(section, MIXED_PRECISION)


FORMAT = PackQuantizedFormat()
READ_ALONE = (MixedPrecisionFormat(),)
