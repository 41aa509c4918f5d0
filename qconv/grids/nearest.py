"""The nearest codes of multiples of a scale: whole numbers, short floats, the values of a codebook.

Each replaces float32 multiples of one group's scales, [columns, out_features] or a column, in place, and returns them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Nearest(Protocol):
    """What codes there are."""

    def __call__(self, multiples: Tensor, group: int) -> Tensor:
        """Replace multiples of the group's scales by the nearest codes."""


@dataclass(frozen=True, slots=True)
class Integers:
    """Whole numbers, ties to even.

    Attributes:
        lowest: The smallest.
        highest: The largest.
        zeros: What both are counted from, by group and row: float32 [groups, out_features]; None for 0.
    """

    lowest: float
    highest: float
    zeros: Tensor | None = None

    def __call__(self, multiples: Tensor, group: int = 0) -> Tensor:
        """See :class:`Nearest`."""
        if self.zeros is None:
            return multiples.round_().clamp_(self.lowest, self.highest)
        zeros = self.zeros[group]
        return multiples.round_().add_(zeros).clamp_(self.lowest, self.highest).sub_(zeros)


@dataclass(frozen=True, slots=True)
class Floats:
    """Floats of few bits, ties to even.

    Attributes:
        fraction_bits: Of the significand, without its leading one.
        smallest_normal: Below this the steps stay what they are.
        highest: The largest, for all that is beyond it.
    """

    fraction_bits: int
    smallest_normal: float
    highest: float

    @property
    def shift(self) -> float:
        """What added to a float32 leaves room for whole steps alone, in units of its power of two.

        1.5 * 2**23 steps: the processor rounds to them.
        """
        return float(1.5 * 2.0 ** (23 - self.fraction_bits))

    def __call__(self, multiples: Tensor, group: int = 0) -> Tensor:
        """See :class:`Nearest`."""
        multiples.clamp_(-self.highest, self.highest)
        power = (multiples.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=self.smallest_normal)
        shift = power.mul_(self.shift)
        return multiples.add_(shift).sub_(shift)


@dataclass(frozen=True, slots=True)
class Codebook:
    """Values at uneven distances; what lies in the middle goes up.

    Attributes:
        values: float32 [values], ascending.
    """

    values: Tensor
    middles: Tensor = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "middles", (self.values[1:] + self.values[:-1]) / 2.0)

    def __call__(self, multiples: Tensor, group: int = 0) -> Tensor:
        """See :class:`Nearest`."""
        places = torch.bucketize(multiples.contiguous(), self.middles, right=True)
        return multiples.copy_(self.values.index_select(0, places.flatten()).view(multiples.shape))


E4M3 = Floats(fraction_bits=3, smallest_normal=2.0**-6, highest=448.0)
E2M1 = Floats(fraction_bits=1, smallest_normal=1.0, highest=6.0)
E2M1_DOUBLED = Floats(fraction_bits=1, smallest_normal=2.0, highest=12.0)
"""As ggml's MXFP4 has it, its scales being half of what their exponents say."""
