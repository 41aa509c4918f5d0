"""What engines do to the inputs of linears whose activations are quantized, too: rounded to E4M3 or int8, and back.

A build's config.json says how: by a scale of each token (compressed-tensors ``float-quantized`` by row, W8A8, W4A8), of
each run of 128 columns of a token (block FP8), or by a scale that calibration stored. Weights alone say nothing of what
that costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qconv.core.qtensor import Number

_LARGEST = 448.0
"""Of E4M3 (OCP 8-bit Floating Point Specification, 2023, section 5)."""
_LEAST_SCALE = 1.0 / (_LARGEST * 512.0)
"""What vLLM's kernels take for tokens of zeros or next to nothing."""
_LARGEST_INTEGER, _LEAST_MAGNITUDE = 127.0, 1e-10
"""Of int8, and what SGLang's kernel takes for tokens of zeros."""


@dataclass(frozen=True, slots=True)
class InputRounding:
    """How the inputs of a linear are rounded.

    Attributes:
        group: Columns that share a scale, found for each token; None: all of a token.
        scale: float32 [], the stored scale of static activations, for all tokens; None where scales are found.
        number: What to: E4M3 floats or integers of 8 bits.
    """

    group: int | None = None
    scale: Tensor | None = None
    number: Number = "e4m3"

    def __call__(self, inputs: Tensor) -> Tensor:
        """The inputs as an engine multiplies with them: [..., in_features], float, to the same shape and dtype."""
        values = inputs.float()
        if self.scale is not None:
            steps = self.scale.to(values.device)
        else:
            if self.group is not None:
                values = values.view(*inputs.shape[:-1], -1, self.group)
            if self.number == "int":
                return _as_integers(values).view(inputs.shape).to(inputs.dtype)
            steps = (values.abs().amax(-1, keepdim=True) / _LARGEST).clamp_(min=_LEAST_SCALE)
        codes = (values / steps).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        return (codes.float() * steps).view(inputs.shape).to(inputs.dtype)


def _as_integers(values: Tensor) -> Tensor:
    """float32 values rounded to 8-bit integers by the largest magnitude of each last dimension.

    As vLLM's and SGLang's kernels do: times 127 over the largest, to the nearest integer, and by the largest over 127.
    compressed-tensors itself divides by 127.5 where it computes without a kernel.
    """
    largest = values.abs().amax(-1, keepdim=True).clamp_(min=_LEAST_MAGNITUDE)
    return (values * (_LARGEST_INTEGER / largest)).round_().mul_(largest / _LARGEST_INTEGER)


@dataclass(frozen=True, slots=True)
class ActivationScheme:
    """What a ``quantization_config`` says of the inputs of linears.

    Attributes:
        group: See :class:`InputRounding`.
        static: Whether scales are stored, as ``input_scale`` beside each weight.
        number: See :class:`InputRounding`.
    """

    group: int | None = None
    static: bool = False
    number: Number = "e4m3"

    @classmethod
    def parse(cls, section: Mapping[str, Any]) -> ActivationScheme | None:
        """The scheme of FP8 weights; None where inputs stay as they are, or where it is one that is not known here."""
        if section.get("quant_method") == "fp8":
            size = section.get("weight_block_size")
            columns = size[1] if isinstance(size, list) and len(size) == 2 and isinstance(size[1], int) else None
            return cls(columns, section.get("activation_scheme") == "static")
        groups = section.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) else ():
            inputs = group.get("input_activations") if isinstance(group, dict) else None
            if isinstance(inputs, dict) and inputs.get("type") == "float" and inputs.get("num_bits") == 8:
                return cls._of(inputs)
        return None

    @classmethod
    def _of(cls, inputs: Mapping[str, Any]) -> ActivationScheme | None:
        strategy, size = inputs.get("strategy"), inputs.get("group_size")
        if strategy == "group":
            return cls(size) if isinstance(size, int) and size > 0 else None
        if strategy not in ("token", "tensor"):
            return None
        return cls(static=inputs.get("dynamic") is False)

    def of(self, scale: Tensor | None, in_features: int) -> InputRounding | None:
        """Of one linear; None where its stored scale is missing, or its width is no multiple of the groups.

        Args:
            scale: Its stored scale, one element, if there is one.
            in_features: Its width.
        """
        if self.static:
            return None if scale is None or scale.numel() != 1 else InputRounding(scale=scale.float().view(()))
        if self.group is not None and in_features % self.group:
            return None
        return InputRounding(self.group, number=self.number)
