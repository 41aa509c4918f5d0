"""compressed-tensors' ``float-quantized`` layout with dynamic activations, by row or in blocks of 128 x 128.

``weight`` F8_E4M3 [out, in] and ``weight_scale`` in the weight's dtype: [out, 1], where engines quantize each token's
inputs by their own range, or [ceil(out/128), ceil(in/128)], where they do so by groups of 128.
"""

from __future__ import annotations

from typing import Any

from qconv.formats.compressed_tensors import CompressedTensors, is_of_kind, is_static
from qconv.formats.float8 import FLOAT_QUANTIZED


class Fp8DynamicFormat(CompressedTensors):
    """FP8 weights with scales by row or block, activations quantized as they come; by rules also integers."""

    name = "fp8_dynamic"
    number = "e4m3"

    def recognizes(self, section: dict[str, Any]) -> bool:
        """compressed-tensors' float-quantized, unless its activations are static."""
        return is_of_kind(section, FLOAT_QUANTIZED) and not is_static(section)


FORMAT = Fp8DynamicFormat()
