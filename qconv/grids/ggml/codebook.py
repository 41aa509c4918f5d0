"""The sixteen values of IQ4_NL and IQ4_XS, unevenly spaced as the quantiles of bell-shaped weights are."""

from __future__ import annotations

import torch
from gguf.quants import IQ4_NL
from torch import Tensor

from qconv.core.once import MadeOnce

_STEPS = 2  # per unit: the boundaries between two values are multiples of a half
_REACH = 128


@MadeOnce
def _values(device: torch.device) -> Tensor:
    return torch.tensor(IQ4_NL.kvalues, dtype=torch.float32, device=device)


@MadeOnce
def _nearest_table(device: torch.device) -> Tensor:
    """The nearest value to each half unit from -128 upward, float32 [512]."""
    values = _values(device)
    centres = (torch.arange(2 * _REACH * _STEPS, device=device) + 0.5) / _STEPS - _REACH
    return values[torch.bucketize(centres, (values[1:] + values[:-1]) / 2.0)]


def nearest(multiples: Tensor) -> Tensor:
    """Replace each number by the nearest value of the codebook, in place."""
    multiples.add_(_REACH).mul_(_STEPS).clamp_(0.0, 2.0 * _REACH * _STEPS - 1.0)
    index = multiples.to(torch.int32).view(-1)
    return multiples.copy_(_nearest_table(multiples.device).index_select(0, index).view(multiples.shape))


def codes(values: Tensor) -> Tensor:
    """The place of each value in the codebook, uint8."""
    table = torch.zeros(2 * _REACH, dtype=torch.uint8, device=values.device)
    table[_values(values.device).long() + _REACH] = torch.arange(16, dtype=torch.uint8, device=values.device)
    index = (values + _REACH).to(torch.int32).view(-1)
    return table.index_select(0, index).view(values.shape)
