"""Grids round on the host, in C++ where there is a compiler, wherever the columns lie that they round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

from torch import Tensor

from qconv.core.grid import Fit, PackedT, Run, Surroundings


@dataclass(frozen=True, slots=True)
class OnHost(Generic[PackedT]):
    """A weight with its scales fixed on the host, for columns on any device; see :class:`qconv.core.grid.Fit`.

    Attributes:
        fit: The scales.
    """

    fit: Fit[PackedT]

    @property
    def width(self) -> int:
        """Columns that are rounded together."""
        return self.fit.width

    @property
    def span(self) -> int:
        """Columns whose scales hang together."""
        return self.fit.span

    def round_(self, run: Run) -> Tensor:
        """The values that columns get, where those lie."""
        device = run.targets.device
        if device.type == "cpu":
            return self.fit.round_(run)
        hessian = None if run.hessian is None else run.hessian.cpu()
        here = Run(
            run.columns, run.targets.cpu(), run.original.cpu(), run.shares.cpu(), run.metric.cpu(), hessian=hessian
        )
        return self.fit.round_(here).to(device)

    def refit_(self, first: int, around: Surroundings) -> None:
        """Of columns on the host."""
        self.fit.refit_(first, around)

    def pack(self, values: Tensor) -> PackedT:
        """The weight, on the host."""
        return self.fit.pack(values.cpu())
