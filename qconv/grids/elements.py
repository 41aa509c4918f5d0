"""Integer and E4M3 grids, whose weights are :class:`qconv.core.qtensor.QTensor`.

Scales that rows share (blocks of 128 x 128, one for a tensor) stay what the encoder makes them. Those that rows have
for themselves can be chosen anew for given codes; zero points stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Generic

import torch
from torch import Tensor

from qconv.core.grid import Fit, PackedT, Run, Surroundings
from qconv.core.qtensor import CHANNEL, Grid, QTensor
from qconv.core.rounding import storable, to_codes
from qconv.core.settings import ClipSettings
from qconv.grids import e4m3, integers
from qconv.grids.nearest import E4M3, Integers
from qconv.grids.scales import Scales
from qconv.grids.steps import StepFit


@dataclass(frozen=True, slots=True)
class IntegerGrid:
    """The values that integer codes can stand for.

    Attributes:
        grid: Which ones.
        clip: The grid's own rounding searches each group's clipping range for the least squared error; None takes the
            full range.
    """

    grid: Grid
    clip: ClipSettings | None = None

    @property
    def name(self) -> str:
        """Bits and group size, and what is unusual."""
        group = "per row" if self.grid.group_size == CHANNEL else f"g{self.grid.group_size}"
        ends = ["" if self.grid.symmetric else " with zero points", " in act_order" if self.grid.act_order else ""]
        return f"int{self.grid.bits} {group}{''.join(ends)}"

    def encode(self, weight: Tensor, importance: Tensor | None = None) -> QTensor:
        """See :class:`qconv.core.grid.FittedGrid`.

        Importance has no effect but one: with ``act_order`` groups are made of columns of falling importance.
        """
        if not self.grid.act_order:
            return integers.quantize(weight, self.grid, self.clip)
        columns = weight.shape[1]
        order = torch.arange(columns)
        if importance is not None:
            order = torch.argsort(importance, descending=True, stable=True)
        return _in_place(integers.quantize(weight.index_select(1, order), self.grid, self.clip), order)

    def fit(self, weight: Tensor, encoded: QTensor) -> Fit[QTensor]:
        """See :class:`qconv.core.grid.FittedGrid`; ``encoded`` may be GPTQ's, too."""
        grid, levels = self.grid, float(self.grid.levels)
        zeros = None if encoded.zero_points is None else encoded.zero_points.t().float().contiguous()
        lowest, highest = (-levels / 2.0, levels / 2.0 - 1.0) if zeros is None else (0.0, levels - 1.0)
        scales = _scales(encoded.scales, grid, weight.shape)

        def packed(scales: Scales, values: Tensor) -> QTensor:
            codes = torch.empty(weight.shape, dtype=torch.uint8)
            for rows, _, counted in scales.by_rows(values):
                grouped = counted.view(len(scales.steps), -1, counted.shape[1])
                grouped.add_(float(grid.mid) if zeros is None else zeros[:, rows].unsqueeze(1))
                codes[rows] = to_codes(counted, grid.bits).t()
            stored = scales.steps.t().to(grid.scale_dtype).contiguous()
            return QTensor(grid, codes, stored, encoded.zero_points)

        fit = StepFit(scales, Integers(lowest, highest, zeros), packed)
        if encoded.group_index is None:
            return fit
        return _Permuted(fit, torch.argsort(encoded.group_index, stable=True), _in_place)


@dataclass(frozen=True, slots=True)
class E4M3Grid:
    """E4M3 numbers that share scales by block, by row or as a whole.

    Attributes:
        grid: Which of them.
        clip: Each scale is searched for the least squared error; None puts the largest weight at 448.
        input_scale: float32 [], of the linear's inputs, on a grid with static activations.
    """

    grid: Grid
    clip: ClipSettings | None = None
    input_scale: Tensor | None = None

    @property
    def name(self) -> str:
        """What shares a scale."""
        rows, columns = self.grid.block_rows, self.grid.group_size
        if self.grid.scale_dtype is torch.float8_e8m0fnu:
            return "MXFP8"
        if columns == CHANNEL:
            return "E4M3 per tensor" if rows == CHANNEL else "E4M3 per row"
        return f"E4M3 {rows}x{columns}"

    def encode(self, weight: Tensor, importance: Tensor | None = None) -> QTensor:
        """See :class:`qconv.core.grid.FittedGrid`; importance has no effect."""
        return e4m3.quantize(weight, self.grid, self.clip, self.input_scale)

    def fit(self, weight: Tensor, encoded: QTensor) -> Fit[QTensor]:
        """See :class:`qconv.core.grid.FittedGrid`."""
        own_rows = self.grid.rows_sharing(len(weight)) == 1

        def packed(scales: Scales, values: Tensor) -> QTensor:
            codes = torch.empty_like(encoded.codes)
            for rows, _, found in scales.by_rows(values):
                codes[rows] = found.to(torch.float8_e4m3fn).t()
            stored = scales.steps.t().to(self.grid.scale_dtype).contiguous() if own_rows else encoded.scales
            return replace(encoded, codes=codes, scales=stored)

        return StepFit(_scales(encoded.scales, self.grid, weight.shape), E4M3, packed, refittable=own_rows)


def _scales(stored: Tensor, grid: Grid, shape: torch.Size) -> Scales:
    rows, columns = shape
    spread = stored.t().float()
    if spread.shape[1] != rows:
        spread = spread.repeat_interleave(grid.rows_sharing(rows), 1)[:, :rows]

    def store(steps: Tensor) -> Tensor:
        return storable(steps.clamp(min=0.0), grid.scale_dtype).float()

    # A copy, which refits may change.
    steps = spread.clone(memory_format=torch.contiguous_format)
    return Scales(width=grid.width(columns), steps=steps, bases=None, store=store)


def _in_place(weight: QTensor, order: Tensor) -> QTensor:
    """A weight whose columns are in an order, with each where it was before."""
    inverse = torch.argsort(order)
    group_index = (inverse // weight.grid.width(len(order))).to(torch.int32)
    return replace(weight, codes=weight.codes.index_select(1, inverse), group_index=group_index)


@dataclass(slots=True)
class _Permuted(Generic[PackedT]):
    """A fit whose groups are runs of columns in an order of their own.

    Attributes:
        inner: The same with columns in that order.
        order: int64 [in_features].
        restored: Gives a packed weight its columns' places back.
    """

    inner: StepFit[PackedT]
    order: Tensor
    restored: Callable[[PackedT, Tensor], PackedT]
    width: int = field(default=1, init=False)
    _places: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._places = torch.argsort(self.order)

    @property
    def span(self) -> int:
        """See :class:`qconv.core.grid.Fit`."""
        return len(self.order)

    def round_(self, run: Run) -> Tensor:
        """See :class:`qconv.core.grid.Fit`."""
        return self.inner.round_(replace(run, columns=self._places[list(run.columns)].tolist()))

    def refit_(self, first: int, around: Surroundings) -> None:
        """See :class:`qconv.core.grid.Fit`."""
        columns = self.order + (first - around.first)
        hessian = around.hessian.index_select(0, columns).index_select(1, columns)
        ordered = Surroundings(0, hessian, around.values[columns], around.gradient[columns])
        for start in range(0, len(columns), self.inner.span):
            self.inner.refit_(start, ordered)
        around.values[columns] = ordered.values
        around.gradient[columns] = ordered.gradient

    def pack(self, values: Tensor) -> PackedT:
        """See :class:`qconv.core.grid.Fit`."""
        return self.restored(self.inner.pack(values.index_select(0, self.order)), self.order)
