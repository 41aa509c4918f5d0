"""Encoders of ggml's block types in plain torch operations: weights in, the bytes of a GGUF tensor out.

``encoding`` is the way in: by ``compiled`` in C++ where there is a compiler, else by ``direct`` (types whose formula
leaves nothing to search) or ``searched``. The searches are ``scaled``, ``affine`` and ``signed``, whose points
``lattice`` has; ``superblock`` and ``trials`` are what they share; ``packing`` makes the blocks' bytes.
"""

from __future__ import annotations

from qconv.grids.ggml.block_types import GgmlType
from qconv.grids.ggml.encoding import encode

__all__ = ["GgmlType", "encode"]
