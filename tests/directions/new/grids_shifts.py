"""Integers whose scales are powers of two: a multiplication by one is a shift."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qconv.core.grid import Fit
from qconv.core.qtensor import Grid, QTensor
from qconv.core.settings import ClipSettings
from qconv.grids.elements import IntegerGrid


@dataclass(frozen=True, slots=True)
class ShiftGrid:
    """Symmetric integers."""

    grid: Grid
    clip: ClipSettings | None = None

    @property
    def name(self) -> str:
        """As reports call it."""
        return f"shifts of {self.grid.bits} bits"

    def encode(self, weight: Tensor, importance: Tensor | None = None) -> QTensor:
        """The least power of two that leaves nothing out."""
        found = IntegerGrid(self.grid, self.clip).encode(weight)
        scales = torch.exp2(torch.ceil(torch.log2(found.scales.float().clamp(min=2.0**-60))))
        grouped = weight.view(len(weight), scales.shape[1], -1) / scales.unsqueeze(-1)
        codes = (grouped.round_() + self.grid.mid).clamp_(0, self.grid.levels - 1)
        return replace(found, codes=codes.view(weight.shape).to(torch.uint8), scales=scales.to(self.grid.scale_dtype))

    def fit(self, weight: Tensor, encoded: QTensor) -> Fit[QTensor]:
        """Scales stay what they are."""
        fit: Any = IntegerGrid(self.grid).fit(weight, encoded)
        found: Fit[QTensor] = replace(fit, refittable=False)
        return found


GRID = ShiftGrid
