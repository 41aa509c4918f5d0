"""Weights that are rounded one by one, to the nearest code of their group's step and base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic

from torch import Tensor

from qconv.core.grid import PackedT, Run, Surroundings
from qconv.grids import turns
from qconv.grids.ggml.numeric import reciprocal
from qconv.grids.nearest import Nearest
from qconv.grids.scales import Scales


@dataclass(slots=True)
class StepFit(Generic[PackedT]):
    """A weight whose elements are ``step * code + base``.

    Attributes:
        scales: Of its groups.
        nearest: The codes.
        packing: Makes the packed weight of values, float32 [in_features, out_features].
        refittable: Whether rows have scales of their own, which can be chosen anew.
    """

    scales: Scales
    nearest: Nearest
    packing: Callable[[Scales, Tensor], PackedT]
    refittable: bool = True
    width: int = field(default=1, init=False)
    _inverse: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._inverse = reciprocal(self.scales.steps)

    @property
    def span(self) -> int:
        """See :class:`qconv.core.grid.Fit`."""
        return self.scales.span

    def round_(self, run: Run) -> Tensor:
        """See :class:`qconv.core.grid.Fit`."""
        values = turns.round_steps(run, self.scales, self._inverse, self.nearest)
        return run.in_turn(1, self._nearest) if values is None else values

    def _nearest(self, column: int, targets: Tensor, metric: Tensor) -> Tensor:
        group, bases = column // self.scales.width, self.scales.bases
        if bases is not None:
            targets.sub_(bases[group])
        values = self.nearest(targets.mul_(self._inverse[group]), group).mul_(self.scales.steps[group])
        return values if bases is None else values.add_(bases[group])

    def refit_(self, first: int, around: Surroundings) -> None:
        """See :class:`qconv.core.grid.Fit`."""
        if self.refittable:
            self.scales.refit_(first, around)
            groups = slice(first // self.scales.width, (first + self.span) // self.scales.width)
            self._inverse[groups] = reciprocal(self.scales.steps[groups])

    def pack(self, values: Tensor) -> PackedT:
        """See :class:`qconv.core.grid.Fit`."""
        return self.packing(self.scales, values)
