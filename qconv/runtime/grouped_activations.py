"""Inputs rounded in groups of 16 or 32 columns, each with a scale of few bits: NVFP4, MXFP4 and MXFP8.

compressed-tensors defines both ways of finding scales; what is computed here in float32 its engines may compute in the
inputs' own dtype, which moves some of them to a neighbouring scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qconv.grids.nearest import E2M1, E4M3, Floats
from qconv.runtime.activations import InputRounding

_GROUP = 16
_SCALE_MAX = E4M3.highest
_SCALE_OF_ZEROS = 0.125
"""What a group takes whose scale would be 0."""
_ROUND_UP = 1.75
"""From what multiple of a power of two on a group's largest input counts as the next one."""


@dataclass(frozen=True, slots=True)
class Nvfp4Rounding(InputRounding):
    """E2M1 numbers in groups of 16, whose scales are E4M3 numbers times ``scale``, which calibration has stored."""

    def __call__(self, inputs: Tensor) -> Tensor:
        """See :class:`InputRounding`."""
        assert self.scale is not None
        shared = float(self.scale)
        groups = inputs.float().view(*inputs.shape[:-1], -1, _GROUP)
        wanted = groups.abs().amax(-1, keepdim=True) / (E2M1.highest * shared)
        scales = wanted.clamp_(max=_SCALE_MAX).to(torch.float8_e4m3fn).double()
        steps = scales.masked_fill_(scales == 0.0, _SCALE_OF_ZEROS).mul_(shared).float()
        return E2M1(groups / steps, 0).mul_(steps).view(inputs.shape).to(inputs.dtype)


@dataclass(frozen=True, slots=True)
class MicroscalingRounding(InputRounding):
    """Floats in groups whose scales are powers of two."""

    floats: Floats = E4M3

    def __call__(self, inputs: Tensor) -> Tensor:
        """See :class:`InputRounding`."""
        assert self.group is not None
        groups = inputs.float().view(*inputs.shape[:-1], -1, self.group)
        largest, power = torch.frexp(groups.abs().amax(-1, keepdim=True))  # largest in [0.5, 1)
        own = int(torch.frexp(torch.tensor(self.floats.highest)).exponent)
        power = power + (largest * 2.0 >= _ROUND_UP).to(power.dtype) - own
        steps = torch.ldexp(torch.ones_like(largest), power.clamp_(-126, 127))
        return self.floats(groups / steps, 0).mul_(steps).view(inputs.shape).to(inputs.dtype)
