"""Which rows of a weight do not stand for the source's rows, whatever the rest of the tensor is like.

A signal to noise ratio over a whole tensor does not see one expert of 160 that is zero, or two that are exchanged. One
over a row has no floor: a few outliers can hold most of a row's signal, and rounding with an importance may give them
up. So a row is only called wrong if two things say so: its direction has nothing in common with the source's, and the
signs of its larger elements agree with the source's hardly more often than chance. Rounding keeps the signs of what is
not small, to two bits and below; an unrelated row agrees in half of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

LEAST_AGREEMENT = 0.7
"""Sound rows of two bits have above 0.9; unrelated ones 0.5, with a deviation of 0.044 for the 128 larger of 256."""
LEAST_RATIO = 1.26
"""Signal over noise of a row, 1 dB; sound rows of two bits have 3 dB and more, but for what outliers do."""
MOST_SIZE = 1.6
"""As :attr:`Least.size`."""
SMALLEST = 1e-4
"""Rows without an element of that size may be rounded to anything: half precision scales end at 6e-8, and a scale is a
thousandth of its block's largest element in the types of two bits."""

_LEAST = 1e-30


@dataclass(frozen=True, slots=True)
class Least:
    """What a sound row has at least.

    Attributes:
        cosine: Of its angle to the source's. Rows of two bits have 0.8; that of unrelated ones has a standard deviation
            of one over the root of the columns, 0.06 for 256.
        size: The mean size of its larger elements over the source's: 0.7 to 1.2 for rows of two bits.
    """

    cosine: float = 0.3
    size: float = 0.5


USUAL = Least()


@dataclass(slots=True)
class WrongRows:
    """The wrong rows of one part of a tensor.

    Attributes:
        least: What a sound row has.
        rows: How many there are.
        of: How many rows were looked at.
        zero: How many of the wrong ones are all zeros.
        first: The number of the first of them.
    """

    least: Least = USUAL
    rows: int = 0
    of: int = 0
    zero: int = 0
    first: int | None = field(default=None)

    def add(self, source: Tensor, made: Tensor) -> None:
        """Look at the next rows.

        Args:
            source: float32 [rows, columns], as it should be.
            made: float32 [rows, columns], as it is.
        """
        wrong = wrong_rows(source, made, self.least)
        if bool(wrong.any()):
            if self.first is None:
                self.first = self.of + int(torch.nonzero(wrong)[0])
            self.rows += int(wrong.sum())
            self.zero += int((wrong & ~made.any(dim=1)).sum())
        self.of += len(source)

    def __str__(self) -> str:
        kind = "are zero" if self.zero == self.rows else "are not the source's"
        return f"{self.rows} of {self.of} rows {kind}, the first is row {self.first}"


def wrong_rows(source: Tensor, made: Tensor, least: Least = USUAL) -> Tensor:
    """Which rows do not stand for the source's: bool [rows].

    Args:
        source: float32 [rows, columns].
        made: float32 [rows, columns], finite.
        least: What a sound row has.
    """
    signal, noise = source.square().sum(dim=1), (source - made).square().sum(dim=1)
    lengths = (signal * made.square().sum(dim=1)).sqrt()
    cosine = (source * made).sum(dim=1) / lengths.clamp_min(_LEAST)
    counted = source.abs().amax(dim=1) >= SMALLEST
    suspects = torch.nonzero(counted & ((cosine < least.cosine) | (signal < LEAST_RATIO * noise))).flatten()
    wrong = torch.zeros_like(counted)
    if len(suspects):
        far = signal[suspects] < LEAST_RATIO * noise[suspects]
        wrong[suspects] = _are_wrong(source[suspects], made[suspects], cosine[suspects] < least.cosine, far, least.size)
    return wrong


def _are_wrong(source: Tensor, made: Tensor, apart: Tensor, far: Tensor, least_size: float) -> Tensor:
    """Suspects by their larger elements alone, which outliers do not outweigh: their signs, and their mean size.

    Args:
        source, made: float32 [rows, columns].
        apart: Whether a row's direction has nothing in common with the source's, bool [rows].
        far: Whether it is about as far from the source's as that from zero, bool [rows].
        least_size: What a sound row has.
    """
    sizes = source.abs()
    middle = sizes.masked_fill(sizes == 0.0, torch.nan).nanmedian(dim=1, keepdim=True).values
    larger = sizes >= middle
    count = larger.sum(dim=1)
    agreement = 0.5 + 0.5 * (source.sign() * made.sign() * larger).sum(dim=1) / count
    ours, theirs = ((values.abs().minimum(8.0 * middle) * larger).sum(dim=1) for values in (made, source))
    resized = (ours < least_size * theirs) | (ours > MOST_SIZE * theirs)
    # Sparse rows have few elements to judge by: one or two say nothing.
    return (count >= 4) & ((apart & (agreement < LEAST_AGREEMENT)) | (far & resized))


class RowReader:
    """Blocks of rows, taken so many rows at a time, however they come."""

    def __init__(self, blocks: Iterator[Tensor]) -> None:
        self._blocks = blocks
        self._left: Tensor | None = None

    def take(self, count: int) -> Iterator[Tensor]:
        """The next ``count`` rows, in as many blocks as they come in; fewer where there are no more."""
        while count:
            block = self._left if self._left is not None else next(self._blocks, None)
            if block is None:
                return
            yield block[:count]
            taken = min(count, len(block))
            self._left = block[taken:] if taken < len(block) else None
            count -= taken
