"""Weights that are rounded eight at a time to points of -1, 0 and 1 and a shift: IQ1_S and IQ1_M.

Each eight weights of IQ1_M take whichever shift suits them; those of IQ1_S keep the one that the encoder's search gave
their sub-block. Within the eight errors are weighed as in :mod:`qconv.grids.lattices`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic

from torch import Tensor

from qconv.core.grid import PackedT, Run, Surroundings
from qconv.grids import turns
from qconv.grids.ggml.lattice import lattice
from qconv.grids.ggml.shifted import POINT, Encoded, ShiftedGrid, Source
from qconv.grids.lattices import codes_of
from qconv.grids.scales import Scales


@dataclass(slots=True)
class ShiftedFit(Generic[PackedT]):
    """A weight whose elements are ``step * (g + shift)``.

    Attributes:
        scales: Of its sub-blocks.
        grid: The lattice.
        shifts: Of the sub-blocks, float32 [sub-blocks, out_features]; None where each eight weights have their own.
        packing: Makes the packed weight of values, float32 [in_features, out_features].
    """

    scales: Scales
    grid: ShiftedGrid
    shifts: Tensor | None
    packing: Callable[[Scales, Tensor], PackedT]
    width: int = field(default=POINT, init=False)

    @property
    def span(self) -> int:
        """See :class:`qconv.core.grid.Fit`."""
        return self.scales.span

    def round_(self, run: Run) -> Tensor:
        """See :class:`qconv.core.grid.Fit`."""
        values = turns.round_points(run, self.scales, self.grid, self.shifts)
        return run.in_turn(POINT, self._nearest) if values is None else values

    def _nearest(self, first: int, targets: Tensor, metric: Tensor) -> Tensor:
        group = first // self.scales.width
        step = self.scales.steps[group]
        source = Source.of(targets, metric.unsqueeze(1).expand_as(targets).contiguous(), self.grid)
        values = source.points(step).values if self.shifts is None else source.nearest(step, self.shifts[group])
        return values.mul_(step)

    def refit_(self, first: int, around: Surroundings) -> None:
        """See :class:`qconv.core.grid.Fit`."""
        self.scales.refit_(first, around)

    def pack(self, values: Tensor) -> PackedT:
        """See :class:`qconv.core.grid.Fit`."""
        return self.packing(self.scales, values)


def encoded_of(values: Tensor, integers: Tensor, d: Tensor, grid: ShiftedGrid) -> Encoded:
    """What a search would have found.

    Args:
        values: ``g + shift``, or 0 where a step is, float32 [elements, sub-blocks, blocks].
        integers: Odd, float32 [sub-blocks, blocks].
        d: float32 [blocks].
        grid: The lattice.
    """
    levels = values.round()
    negative = (values < levels)[::POINT]
    return Encoded(
        codes_of(levels, lattice(grid.type, values.device)), negative, (integers - 1.0).clamp(min=0.0) / 2, d
    )
