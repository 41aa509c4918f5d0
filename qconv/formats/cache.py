"""Scales of a cache of keys and values in FP8, as formats name them beside a layer's attention.

Engines keep a key, after its rotation, as E4M3 of itself over ``k_scale``, and a value over ``v_scale``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qconv.checkpoint.header import TensorSpec

_MAX = 448.0
"""Of E4M3 (OCP 8-bit Floating Point Specification, 2023, section 5)."""


@dataclass(frozen=True, slots=True)
class CacheNaming:
    """How a format holds the scales.

    Attributes:
        key: What follows the attention's name in that of the keys' scale.
        value: The same of the values'.
        shape: Of one scale, which is one number.
        dtype: In which it is stored; None for that of the model's weights.
        section: What ``quantization_config`` says of the cache.
    """

    key: str
    value: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    section: Mapping[str, Any]

    def specs(self, attention: str, weight_dtype: torch.dtype) -> tuple[TensorSpec, TensorSpec]:
        """The tensors of a layer, in file order."""
        dtype = weight_dtype if self.dtype is None else self.dtype
        key, value = (TensorSpec(f"{attention}.{leaf}", dtype, self.shape) for leaf in (self.key, self.value))
        return key, value

    def tensors(
        self, attention: str, weight_dtype: torch.dtype, key: float, value: float
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors of :meth:`specs`.

        Args:
            attention: The attention's name.
            weight_dtype: Of the model's weights.
            key: The largest magnitude of the layer's keys.
            value: The same of its values.
        """
        for spec, largest in zip(self.specs(attention, weight_dtype), (key, value), strict=True):
            yield spec.name, scale_of(largest, spec.dtype).view(spec.shape)


def scale_of(largest: float, dtype: torch.dtype) -> Tensor:
    """The least scale of a dtype, [], by which no magnitude up to the ``largest`` exceeds E4M3's; 1 for zeros."""
    wanted = torch.tensor(largest / _MAX if largest > 0.0 else 1.0, dtype=torch.float64)
    scale = wanted.to(dtype)
    return scale if scale.double() >= wanted else torch.nextafter(scale, torch.tensor(torch.inf, dtype=dtype))


_FP8 = {"num_bits": 8, "type": "float", "dynamic": False}
COMPRESSED_TENSORS = CacheNaming(
    "k_scale", "v_scale", (1,), None, {"kv_cache_scheme": {**_FP8, "strategy": "tensor", "symmetric": True}}
)
MODELOPT = CacheNaming("k_proj.k_scale", "v_proj.v_scale", (), torch.float32, {"kv_cache_scheme": _FP8})
"""ModelOpt's ``hf_quant_config.json`` says ``kv_cache_quant_algo: FP8`` besides."""
NAMINGS = (COMPRESSED_TENSORS, MODELOPT)
