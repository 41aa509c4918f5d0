"""GPTQ: rounding column by column, each column taking up the errors of those before it.

Frantar et al. 2022, https://arxiv.org/abs/2210.17323. The loss of an output row with weight error d is ``d H d^T``, H
the inputs' second moments. With ``H = R R^T``, R upper triangular, it is a sum over columns,

    ``sum_j R[j, j]^2 (d_j + sum_{i<j} d_i R[i, j] / R[j, j])^2``,

so that the column j is best rounded from ``w_j + sum_{i<j} d_i R[i, j] / R[j, j]``, d_i being the errors already made.
R is the inverse of the paper's factor (the upper Cholesky factor U of H^-1: ``H^-1 = U^T U`` gives ``U = R^-1``), and
the two forms round the same numbers (Chee et al. 2023, https://arxiv.org/abs/2307.13304, theorem 6). This one needs one
factorization where the paper's needs two and an inversion, and works where H is barely invertible.

With the ordering ``none`` a group takes its scales from the compensated weights when its first column's turn comes.
With ``static`` all scales are fixed on the original weights; then columns are rounded in the order of falling
``H[j, j]``, the important ones before errors pile up. Columns keep their place, so readers need no permutation. With
``desc_act`` columns are taken in that order too, and a group is a run of them: its scale fits columns of like
importance, but readers must look up each column's group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qconv.core.hessian import Factor, factorize, is_finite, row_errors
from qconv.core.qtensor import Grid, QTensor
from qconv.core.rounding import (
    assemble,
    clip_ratios,
    decode_,
    encode_,
    fake_quantize,
    grid_parameters,
    group_range,
    range_parameters,
    round_to_nearest,
    row_blocks,
    to_codes,
)
from qconv.core.settings import ClipSettings, GptqSettings
from qconv.errors import QconvError, UsageError
from qconv.methods.compensated.columns import by_gptq

ROUNDING = by_gptq
"""On any grid, its scales fixed; :func:`quantize` is for integers, whose groups may take their scales on the way."""


@dataclass(frozen=True, slots=True)
class GptqResult:
    """A quantized weight and what it costs.

    Attributes:
        qtensor: The weight.
        damp_percent: See :class:`Factor`.
        escalations: See :class:`Factor`.
        dead_columns: See :class:`Factor`.
        error: ``trace(d H d^T)`` of the weight's error d, H without damping.
        rtn_error: The same for plain rounding to nearest.
        kept_rtn: How many output rows were kept as plain rounding gives them, since they cost less that way.
    """

    qtensor: QTensor
    damp_percent: float
    escalations: int
    dead_columns: int
    error: float
    rtn_error: float
    kept_rtn: int


def quantize(
    weight: Tensor,
    grid: Grid,
    hessian: Tensor,
    settings: GptqSettings,
    clip: ClipSettings | None = None,
    factor: Factor | None = None,
) -> GptqResult:
    """Quantize a weight so that the linear's output changes least on the calibration tokens.

    Never worse than rounding to nearest on the same grid: a row whose error ``d H d^T`` comes out larger than plain
    rounding's (full range, no compensation) is replaced by it.

    Args:
        weight: float32 [out_features, in_features], finite; not changed.
        grid: The grid; with ``act_order`` if that is what ``settings`` ask for.
        hessian: float32 [in_features, in_features], the mean over tokens of ``x x^T``; not changed.
        settings: How columns are worked through.
        clip: Search each group's clipping range for the least error; None takes the full range.
        factor: ``factorize(hessian, settings)`` where it is known already; it is the larger part of the work.

    Raises:
        QconvError: the weight or the Hessian is not finite, or the Hessian is not positive semidefinite.
        UsageError: the group size does not divide the row.
    """
    if grid.act_order != (settings.ordering == "desc_act"):
        raise UsageError(f"GPTQ: ordering {settings.ordering} does not suit a grid with act_order {grid.act_order}.")
    if not is_finite(weight):
        raise QconvError("GPTQ: the weight holds values that are not finite.")
    if factor is None:
        factor = factorize(hessian, settings)
    compensated = _Rounding(weight, grid, factor, clip).run(settings)
    errors = row_errors(compensated.dequantize().sub_(weight), hessian)
    rtn_errors = row_errors(_nearest(weight, grid, factor).sub_(weight), hessian)
    worse = rtn_errors < errors
    return GptqResult(
        _with_rows_of_rtn(compensated, weight, worse, factor),
        factor.damp_percent,
        factor.escalations,
        factor.dead_columns,
        error=float(torch.minimum(errors, rtn_errors).sum()),
        rtn_error=float(rtn_errors.sum()),
        kept_rtn=int(worse.sum()),
    )


def _nearest(weight: Tensor, grid: Grid, factor: Factor) -> Tensor:
    """The weight after plain rounding in the grid's groups, float32 [out_features, in_features]."""
    if not grid.act_order:
        return fake_quantize(weight, grid)
    rounded = fake_quantize(weight.index_select(1, factor.order), grid)
    return rounded.index_select(1, torch.argsort(factor.order))


def _with_rows_of_rtn(weight: QTensor, source: Tensor, chosen: Tensor, factor: Factor) -> QTensor:
    """``weight``, changed in place: the ``chosen`` rows, bool [out_features], rounded to nearest from ``source``."""
    rows = chosen.nonzero().squeeze(1)
    if not len(rows):
        return weight
    columns, order = source.shape[1], factor.order if weight.grid.act_order else None
    blocks = (source[rows[start:stop]] for start, stop in row_blocks(len(rows), columns))
    ordered = (block if order is None else block.index_select(1, order) for block in blocks)
    nearest = assemble((round_to_nearest(block, weight.grid) for block in ordered), len(rows))
    weight.codes[rows] = nearest.codes if order is None else nearest.codes.index_select(1, torch.argsort(order))
    weight.scales[rows] = nearest.scales
    if weight.zero_points is not None and nearest.zero_points is not None:
        weight.zero_points[rows] = nearest.zero_points
    return weight


class _Rounding:
    """The state of one weight's rounding. Matrices are transposed: a column of the weight is one run of memory.

    Attributes:
        members: int64 [in_features], in the order of their rounding: a column's place in the row of groups.
        original: float32 [in_features, out_features], the weight, columns in the order of their rounding.
        target: The same plus the compensation so far; rows that are done hold codes.
        scales: [groups, out_features], the grid's scale dtype.
        zero_points: uint8 [groups, out_features] or None.
        steps: The scales as float32.
        zeros: The zero points as float32, the grid's fixed one where it is symmetric.
    """

    def __init__(self, weight: Tensor, grid: Grid, factor: Factor, clip: ClipSettings | None) -> None:
        self.grid, self.factor, self.clip = grid, factor, clip
        device = weight.device
        self.members = torch.arange(len(factor.order), device=device) if grid.act_order else factor.order
        self.columns, self.rows = weight.shape[1], weight.shape[0]
        self.width = grid.width(self.columns)
        groups = grid.groups(self.columns)
        # A transposed copy first: picking rows of a transposed view is four times slower.
        self.original = weight.t().contiguous().index_select(0, factor.order)
        self.target = self.original.clone()
        self.scales = torch.empty(groups, self.rows, dtype=grid.scale_dtype, device=device)
        self.zero_points = None if grid.symmetric else torch.empty(groups, self.rows, dtype=torch.uint8, device=device)
        self.steps = torch.empty(groups, self.rows, device=device)
        self.zeros = torch.full((groups, self.rows), float(grid.mid), device=device)

    def run(self, settings: GptqSettings) -> QTensor:
        """Round every column."""
        fixed = settings.ordering == "static"
        inverse = torch.argsort(self.factor.order)
        if fixed:
            for group, columns in enumerate(inverse.view(-1, self.width)):
                self._fix_scales(group, columns, self.original.index_select(0, columns))
        for start, stop in self._blocks(settings.block_size, fixed):
            delta = torch.empty(stop - start, self.rows, device=self.target.device)
            # Columns that share scales taken from the compensated weights are compensated together.
            step = stop - start if fixed else min(self.width, stop - start)
            for first in range(start, stop, step):
                last = first + step
                if first > start:
                    self._compensate(start, first, last, delta[: first - start])
                if not fixed and first % self.width == 0:
                    columns = torch.arange(first, first + self.width, device=self.target.device)
                    self._fix_scales(first // self.width, columns, self._expected(first, first + self.width))
                self._round_columns(first, last, delta[first - start : last - start])
            self._compensate(start, stop, self.columns, delta)
        zero_points = None if self.zero_points is None else self.zero_points.t().contiguous()
        codes = to_codes(self.target, self.grid.bits).index_select(0, inverse)
        group_index = (inverse // self.width).to(torch.int32) if self.grid.act_order else None
        return QTensor(self.grid, codes.t().contiguous(), self.scales.t().contiguous(), zero_points, group_index)

    def _blocks(self, block_size: int, fixed: bool) -> Iterator[tuple[int, int]]:
        """Ranges of columns; where groups take their scales on the way, none begins or ends inside a smaller group."""
        span = self.columns if fixed else self.width
        size = block_size if fixed or block_size < span else block_size // span * span
        span = max(span, size)
        for start in range(0, self.columns, span):
            end = min(start + span, self.columns)
            for first in range(start, end, size):
                yield first, min(first + size, end)

    def _compensate(self, done: int, start: int, stop: int, delta: Tensor) -> None:
        """Add to columns ``start:stop`` what the errors ``delta`` of the columns from ``done`` on make them take up."""
        if start < stop:
            share = self.factor.upper[done : done + len(delta), start:stop]
            self.target[start:stop].addmm_(share.t(), delta)

    def _round_columns(self, start: int, stop: int, delta: Tensor) -> None:
        """Round columns one after the other; their errors go to ``delta``, float32 [stop - start, out_features]."""
        share = self.factor.upper[start:stop, start:stop].t().contiguous()
        for index, group in enumerate((self.members[start:stop] // self.width).tolist()):
            column, step, zero = self.target[start + index], self.steps[group], self.zeros[group]
            if index:
                column.addmv_(delta[:index].t(), share[index, :index])
            column.div_(step).round_().add_(zero).clamp_(0, self.grid.levels - 1)
            error = torch.sub(column, zero, out=delta[index]).mul_(step)
            torch.sub(self.original[start + index], error, out=error)

    def _expected(self, start: int, stop: int) -> Tensor:
        """What columns ``start:stop`` would be rounded from if none of them made an error: the paper's updated weights.

        Their targets hold the shares of the columns before them alone. Taking those up, each has an error of its own
        in ``d_j``, of which the columns after it take their share.
        """
        share = self.factor.upper[start:stop, start:stop].t()
        taken = self.target[start:stop] - self.original[start:stop]
        expected: Tensor = torch.linalg.solve_triangular(share, taken, upper=False, unitriangular=True)
        return expected.add_(self.original[start:stop])

    def _fix_scales(self, group: int, columns: Tensor, weights: Tensor) -> None:
        """Choose a group's scales and zero points.

        Args:
            group: Its number.
            columns: int64 [group_size], its columns by their place in the order.
            weights: float32 [group_size, out_features].
        """
        costs = self.factor.costs[columns]
        for start, stop in row_blocks(self.rows, self.width):
            members = weights[:, start:stop].t().contiguous()
            ratio: Tensor | float = 1.0 if self.clip is None else _cheapest_ratios(members, self.grid, costs, self.clip)
            scales, zero_points = grid_parameters(members, self.grid, ratio)
            self.scales[group, start:stop] = scales.squeeze(1)
            if self.zero_points is not None and zero_points is not None:
                self.zero_points[group, start:stop] = zero_points.squeeze(1)
                self.zeros[group, start:stop] = zero_points.squeeze(1)
        self.steps[group] = self.scales[group]


def _cheapest_ratios(members: Tensor, grid: Grid, costs: Tensor, clip: ClipSettings) -> Tensor:
    """The ratio of each row's range with the least squared error, weighted by the columns' costs.

    Args:
        members: float32 [rows, width].
        grid: The grid.
        costs: float32 [width].
        clip: The ratios to try; ties go to the larger one.

    Returns:
        float32 [rows, 1].
    """
    best = torch.ones(len(members), 1, device=members.device)
    least = torch.full_like(best, torch.inf)
    members = members.unsqueeze(1)
    low, span = group_range(members, grid)
    for ratio in clip_ratios(clip):
        scales, zero_points = range_parameters(low * ratio, span * ratio, grid)
        error = decode_(encode_(members.clone(), scales, zero_points, grid), scales, zero_points, grid).sub_(members)
        cost = error.square_() @ costs
        better = cost < least
        least = torch.where(better, cost, least)
        best.masked_fill_(better, ratio)
    return best
