"""Integers with a scale and a bias a group, both of the weights' dtype: what MLX's affine mode computes with.

A weight is ``code * scale + bias`` (mlx.core.quantize). Zero need not be one of the values, so that a group's codes
reach from its least to its largest weight. Both are rounded to what is stored before codes are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from qconv.core.grid import Fit
from qconv.core.qtensor import Grid, QTensor
from qconv.core.rounding import clip_ratios, row_blocks, storable, to_codes
from qconv.core.settings import ClipSettings
from qconv.grids.nearest import Integers
from qconv.grids.scales import Scales
from qconv.grids.steps import StepFit


@dataclass(frozen=True, slots=True)
class AffineGrid:
    """The values that codes can stand for.

    Attributes:
        grid: Which ones.
        clip: The grid's own rounding searches each group's range for the least squared error; None takes all of it.
    """

    grid: Grid
    clip: ClipSettings | None = None

    @property
    def name(self) -> str:
        """Bits and group size."""
        return f"affine{self.grid.bits} g{self.grid.group_size}"

    def encode(self, weight: Tensor, importance: Tensor | None = None) -> QTensor:
        """See :class:`qconv.core.grid.FittedGrid`; importance counts in the search of ranges."""
        rows, columns = weight.shape
        groups = self.grid.groups(columns)
        codes = torch.empty(rows, columns, dtype=torch.uint8)
        scales, biases = (torch.empty(rows, groups, dtype=self.grid.scale_dtype) for _ in range(2))
        counts = None if importance is None else importance.float().view(groups, -1)
        for start, stop in row_blocks(rows, columns):
            grouped = weight[start:stop].float().view(stop - start, groups, -1)
            scales[start:stop], biases[start:stop] = self._parameters(grouped, counts)
            found = self._encoded(grouped, scales[start:stop], biases[start:stop])
            codes[start:stop] = to_codes(found, self.grid.bits).view(stop - start, columns)
        return QTensor(self.grid, codes, scales, None, biases=biases)

    def fit(self, weight: Tensor, encoded: QTensor) -> Fit[QTensor]:
        """See :class:`qconv.core.grid.FittedGrid`."""
        assert encoded.biases is not None
        steps, bases = (one.t().float().contiguous() for one in (encoded.scales, encoded.biases))
        # Copies, which refits may change.
        scales = Scales(
            width=self.grid.width(weight.shape[1]),
            steps=steps.clone(),
            bases=bases.clone(),
            store=partial(_stored, self.grid),
            store_base=lambda base: base.to(self.grid.scale_dtype).float(),
        )

        def packed(scales: Scales, values: Tensor) -> QTensor:
            assert scales.bases is not None
            codes = torch.empty(weight.shape, dtype=torch.uint8)
            for rows, _, counted in scales.by_rows(values):
                codes[rows] = to_codes(counted.round_(), self.grid.bits).t()
            stored = (one.t().to(self.grid.scale_dtype).contiguous() for one in (scales.steps, scales.bases))
            scale, bias = stored
            return replace(encoded, codes=codes, scales=scale, biases=bias)

        return StepFit(scales, Integers(0.0, self.grid.levels - 1.0), packed)

    def _parameters(self, grouped: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scales and biases of groups float32 [rows, groups, width], of the grid's scale dtype [rows, groups] each."""
        low, high = grouped.amin(-1), grouped.amax(-1)
        best = self._of_range(low, high)
        if self.clip is None:
            return best
        least = self._error(grouped, *best, counts)
        for ratio in clip_ratios(self.clip)[1:]:
            tried = self._of_range(low * ratio, high * ratio)
            error = self._error(grouped, *tried, counts)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, tried[0], best[0]), torch.where(better, tried[1], best[1])
        return best

    def _of_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        bias = low.to(self.grid.scale_dtype)
        span = (high - bias.float()).clamp_(min=0.0)  # from the bias that is stored, so that the largest is reached
        return storable(span / (self.grid.levels - 1), self.grid.scale_dtype), bias

    def _encoded(self, grouped: Tensor, scales: Tensor, biases: Tensor) -> Tensor:
        """Codes as float32 of the groups' shape."""
        based = grouped - biases.float().unsqueeze(-1)
        return based.div_(scales.float().unsqueeze(-1)).round_().clamp_(0, self.grid.levels - 1)

    def _error(self, grouped: Tensor, scales: Tensor, biases: Tensor, counts: Tensor | None) -> Tensor:
        """The squared error of each group, [rows, groups]."""
        values = self._encoded(grouped, scales, biases).mul_(scales.float().unsqueeze(-1))
        error = values.add_(biases.float().unsqueeze(-1)).sub_(grouped).square_()
        return (error if counts is None else error.mul_(counts)).sum(-1)


def _stored(grid: Grid, steps: Tensor) -> Tensor:
    return storable(steps.clamp(min=0.0), grid.scale_dtype).float()
