"""Encoders of ggml's block types in plain torch operations: weights in, the bytes of a GGUF tensor out."""

from __future__ import annotations

from qconv.ggml.block_types import GgmlType
from qconv.ggml.encoding import encode

__all__ = ["GgmlType", "encode"]
