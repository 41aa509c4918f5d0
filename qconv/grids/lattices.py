"""Weights that are rounded eight at a time: IQ2 and IQ3, whose magnitudes are points of a lattice.

Eight weights are what signs are stored for together, and one or two points of the lattice. Within them errors are
weighed by the metric's diagonal; what the eight do to each other beyond that is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic

import torch
from torch import Tensor

from qconv.core.grid import PackedT, Run, Surroundings
from qconv.grids import turns
from qconv.grids.ggml import signed
from qconv.grids.ggml.lattice import Lattice
from qconv.grids.ggml.signed import SIGNS, SignedGrid
from qconv.grids.scales import Scales


@dataclass(slots=True)
class LatticeFit(Generic[PackedT]):
    """A weight whose elements are ``sign * step * magnitude``.

    Attributes:
        scales: Of its sub-blocks.
        grid: The lattice and its signs.
        packing: Makes the packed weight of values, float32 [in_features, out_features].
    """

    scales: Scales
    grid: SignedGrid
    packing: Callable[[Scales, Tensor], PackedT]
    width: int = field(default=SIGNS, init=False)

    @property
    def span(self) -> int:
        """See :class:`qconv.core.grid.Fit`."""
        return self.scales.span

    def round_(self, run: Run) -> Tensor:
        """See :class:`qconv.core.grid.Fit`."""
        values = turns.round_points(run, self.scales, self.grid)
        return run.in_turn(SIGNS, self._nearest) if values is None else values

    def _nearest(self, first: int, targets: Tensor, metric: Tensor) -> Tensor:
        step = self.scales.steps[first // self.scales.width]
        # A negative step, where there is one, is the same lattice with all signs turned.
        source = signed.Source.of(targets, metric.unsqueeze(1).expand_as(targets).contiguous(), self.grid)
        codes, negative = signed.nearest_points(source, step.unsqueeze(0))
        magnitudes = source.lattice.points[codes].permute(0, 2, 1).reshape(targets.shape)
        return torch.where(negative, -magnitudes, magnitudes).mul_(step)

    def refit_(self, first: int, around: Surroundings) -> None:
        """See :class:`qconv.core.grid.Fit`."""
        self.scales.refit_(first, around)

    def pack(self, values: Tensor) -> PackedT:
        """See :class:`qconv.core.grid.Fit`."""
        return self.packing(self.scales, values)


def codes_of(magnitudes: Tensor, lattice: Lattice) -> Tensor:
    """The codes of points by their magnitudes, 0 for what is none: float32 [elements, ...] -> int64 [groups, ...]."""
    size = lattice.elements
    middles = (lattice.levels[1:] + lattice.levels[:-1]) / 2.0
    places = torch.bucketize(magnitudes.contiguous(), middles)
    known = torch.bucketize(lattice.points, middles)
    weights = len(lattice.levels) ** torch.arange(size - 1, -1, -1)
    table = torch.zeros(len(lattice.levels) ** size, dtype=torch.int64)
    table[known @ weights] = torch.arange(len(lattice.points))
    grouped = places.view(-1, size, *places.shape[1:])
    return table[(grouped * weights.view(-1, *(1,) * (places.dim() - 1))).sum(1)]
