"""The block types that are encoded here. Their ids and sizes are the ``gguf`` package's."""

from __future__ import annotations

from enum import Enum

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from qconv.errors import UsageError


class GgmlType(Enum):
    """A tensor type of a GGUF file: a row is a sequence of blocks of so many elements in so many bytes."""

    F32 = GGMLQuantizationType.F32
    F16 = GGMLQuantizationType.F16
    BF16 = GGMLQuantizationType.BF16
    Q8_0 = GGMLQuantizationType.Q8_0
    Q4_0 = GGMLQuantizationType.Q4_0
    Q4_1 = GGMLQuantizationType.Q4_1
    Q5_0 = GGMLQuantizationType.Q5_0
    Q5_1 = GGMLQuantizationType.Q5_1
    IQ4_NL = GGMLQuantizationType.IQ4_NL
    IQ4_XS = GGMLQuantizationType.IQ4_XS
    IQ1_S = GGMLQuantizationType.IQ1_S
    IQ1_M = GGMLQuantizationType.IQ1_M
    IQ2_XXS = GGMLQuantizationType.IQ2_XXS
    IQ2_XS = GGMLQuantizationType.IQ2_XS
    IQ2_S = GGMLQuantizationType.IQ2_S
    IQ3_XXS = GGMLQuantizationType.IQ3_XXS
    IQ3_S = GGMLQuantizationType.IQ3_S
    MXFP4 = GGMLQuantizationType.MXFP4
    TQ1_0 = GGMLQuantizationType.TQ1_0
    TQ2_0 = GGMLQuantizationType.TQ2_0
    Q2_K = GGMLQuantizationType.Q2_K
    Q3_K = GGMLQuantizationType.Q3_K
    Q4_K = GGMLQuantizationType.Q4_K
    Q5_K = GGMLQuantizationType.Q5_K
    Q6_K = GGMLQuantizationType.Q6_K

    @property
    def id(self) -> int:
        """ggml's number of the type, as a GGUF file's tensor info holds it."""
        return int(self.value)

    @property
    def block_elements(self) -> int:
        """Elements of a block."""
        return int(GGML_QUANT_SIZES[self.value][0])

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return int(GGML_QUANT_SIZES[self.value][1])

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, scales included."""
        return 8.0 * self.block_bytes / self.block_elements

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of ``columns`` elements.

        Raises:
            UsageError: the row is no whole number of blocks.
        """
        if columns % self.block_elements:
            raise UsageError(
                f"{self.name} holds blocks of {self.block_elements} weights, which do not divide rows of {columns}",
                hint=f"Store this tensor as {self._fallback(columns).name}, as llama.cpp does.",
            )
        return columns // self.block_elements * self.block_bytes

    def _fallback(self, columns: int) -> GgmlType:
        smaller = _SMALLER_BLOCKS.get(self, GgmlType.F16)
        return GgmlType.F16 if columns % smaller.block_elements else smaller


_SMALLER_BLOCKS = {
    GgmlType.IQ1_S: GgmlType.IQ4_NL,
    GgmlType.IQ1_M: GgmlType.IQ4_NL,
    GgmlType.IQ2_XXS: GgmlType.IQ4_NL,
    GgmlType.IQ2_XS: GgmlType.IQ4_NL,
    GgmlType.IQ2_S: GgmlType.IQ4_NL,
    GgmlType.IQ3_XXS: GgmlType.IQ4_NL,
    GgmlType.IQ3_S: GgmlType.IQ4_NL,
    GgmlType.IQ4_XS: GgmlType.IQ4_NL,
    GgmlType.TQ1_0: GgmlType.Q4_0,
    GgmlType.TQ2_0: GgmlType.Q4_0,
    GgmlType.Q2_K: GgmlType.Q4_0,
    GgmlType.Q3_K: GgmlType.Q4_0,
    GgmlType.Q4_K: GgmlType.Q5_0,
    GgmlType.Q5_K: GgmlType.Q5_1,
    GgmlType.Q6_K: GgmlType.Q8_0,
}
"""What llama.cpp stores instead where a block of 256 does not divide the row; then F16."""
