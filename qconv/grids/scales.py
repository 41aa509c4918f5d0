"""Scales and bases by group and row: a value is ``step * code + base``; and what can become of them for given codes.

For given codes the loss is a quadratic in a group's step and base. Their optimum is rounded to what can be stored, and
taken only where that lowers the loss. In a super-block of ggml, where

    step = d * multiple,  base = -dmin * low   with small integers and float16 d, dmin shared by its sub-blocks,

the integers are refitted one sub-block after the other, then d and dmin.

Tensors are float32 [groups, out_features], a group being a run of neighbouring columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from qconv.core.grid import Surroundings
from qconv.core.rounding import row_blocks
from qconv.grids.ggml.numeric import as_half, reciprocal

_UNIT = 2.0**-9
"""The smallest E4M3 number; other codes are whole or halves."""


@dataclass(slots=True, kw_only=True)
class Scales:
    """Steps and bases that each group has for itself.

    Attributes:
        width: Columns of a group.
        steps: [groups, out_features].
        bases: The same shape, or None where they are 0 or belong to the codes.
        store: Rounds steps to what can be stored.
        store_base: The same of bases.
    """

    width: int
    steps: Tensor
    bases: Tensor | None
    store: Callable[[Tensor], Tensor]
    store_base: Callable[[Tensor], Tensor] = as_half

    @property
    def span(self) -> int:
        """Columns of a group."""
        return self.width

    def codes(self, group: int, values: Tensor) -> Tensor:
        """The codes of a group's values, float32 [width, out_features]; 0 where the step is."""
        based = values if self.bases is None else values - self.bases[group]
        # Exactly: there is no grid whose codes are not multiples of this.
        return (based * reciprocal(self.steps[group])).div_(_UNIT).round_().mul_(_UNIT)

    def all_codes(self, values: Tensor) -> Tensor:
        """The same of all groups, [in_features, out_features]."""
        codes = torch.empty_like(values)
        for group in range(len(self.steps)):
            columns = slice(group * self.width, (group + 1) * self.width)
            codes[columns] = self.codes(group, values[columns])
        return codes

    def by_rows(self, values: Tensor) -> Iterator[tuple[slice, Self, Tensor]]:
        """A few rows at a time: which, their scales, and the codes of their values [in_features, rows]."""
        columns, rows = values.shape
        for start, stop in row_blocks(rows, columns):
            part = self._of_rows(slice(start, stop))
            yield slice(start, stop), part, part.all_codes(values[:, start:stop])

    def _of_rows(self, rows: slice) -> Self:
        return replace(self, steps=self.steps[:, rows], bases=None if self.bases is None else self.bases[:, rows])

    def refit_(self, first: int, around: Surroundings) -> None:
        """:meth:`qconv.core.grid.Fit.refit_`, codes being whole numbers or those of a codebook."""
        for group in range(first // self.width, (first + self.span) // self.width):
            self._refit_group(group, group * self.width - around.first, around)

    def _nearest_step(self, group: int, wanted: Tensor) -> Tensor:
        return self.store(wanted)

    def _nearest_base(self, group: int, wanted: Tensor) -> Tensor:
        return self.store_base(wanted)

    def _take(self, group: int, steps: Tensor, bases: Tensor | None) -> None:
        self.steps[group] = steps
        if self.bases is not None and bases is not None:
            self.bases[group] = bases

    def _refit_group(self, group: int, start: int, around: Surroundings) -> None:
        stop = start + self.width
        codes = self.codes(group, around.values[start:stop])
        gradient, hessian = around.gradient[start:stop], around.hessian[start:stop, start:stop]
        product = hessian @ codes
        slope, curvature = (codes * gradient).sum(0), (codes * product).sum(0)
        old = self.steps[group]
        if self.bases is None:
            new = self._nearest_step(group, old + slope * reciprocal(curvature))
            by = new - old
            better = by * (2.0 * slope - by * curvature) > 0.0
            self._take(group, torch.where(better, new, old), None)
            around.put(start, codes * self.steps[group])
            return
        mixed, ones = product.sum(0), hessian.sum()
        base_slope, old_base = gradient.sum(0), self.bases[group]
        determinant = curvature * ones - mixed * mixed
        joint = (slope * ones - mixed * base_slope) * reciprocal(determinant)
        nothing = torch.zeros_like(old)
        best_gain, best_step, best_base = nothing, old, old_base
        for wanted in (old + joint, old + slope * reciprocal(curvature), old):
            step = self._nearest_step(group, wanted)
            by = step - old
            base = self._nearest_base(group, old_base + (base_slope - by * mixed) / ones)
            for tried in (base, old_base):
                base_by = tried - old_base
                gain = by * (2.0 * slope - by * curvature)
                gain += base_by * (2.0 * base_slope - base_by * ones) - 2.0 * by * base_by * mixed
                better = gain > best_gain
                best_gain = torch.where(better, gain, best_gain)
                best_step, best_base = torch.where(better, step, best_step), torch.where(better, tried, best_base)
        self._take(group, best_step, best_base)
        around.put(start, codes * best_step + best_base)


@dataclass(slots=True, kw_only=True)
class SuperScales(Scales):
    """Steps and bases of super-blocks: small integers times a float16.

    Attributes:
        count: Groups of a super-block.
        d: [super-blocks, out_features], float16 numbers; times ``unit`` what the integers are multiplied by.
        integers: [groups, out_features].
        dmin: As d, for bases; None without them.
        lows: As integers, for bases.
        nearest: Gives the nearest integer that a step can have.
        top: The highest integer that a base can have.
        unit: See d.
    """

    count: int
    d: Tensor
    integers: Tensor
    dmin: Tensor | None
    lows: Tensor | None
    nearest: Callable[[Tensor], Tensor]
    top: int
    unit: float

    @property
    def span(self) -> int:
        """Columns of a super-block."""
        return self.width * self.count

    def refit_(self, first: int, around: Surroundings) -> None:
        """The integers of each sub-block, then d, then dmin."""
        Scales.refit_(self, first, around)
        block = first // self.span
        groups = slice(block * self.count, (block + 1) * self.count)
        start = first - around.first
        values = around.values[start : start + self.span].view(self.count, self.width, -1)
        codes = torch.cat([self.codes(groups.start + index, part) for index, part in enumerate(values)])
        direction = codes.mul_(self._spread(self.integers[groups])).mul_(self.unit)
        self.d[block] = self._refit_shared(self.d[block], direction, start, around)
        self.steps[groups] = self.d[block] * self.unit * self.integers[groups]
        if self.dmin is not None and self.lows is not None and self.bases is not None:
            direction = self._spread(self.lows[groups]).neg_()
            self.dmin[block] = self._refit_shared(self.dmin[block], direction, start, around)
            self.bases[groups] = -(self.dmin[block] * self.lows[groups])

    def _of_rows(self, rows: slice) -> Self:
        part = Scales._of_rows(self, rows)
        return replace(
            part,
            d=self.d[:, rows],
            integers=self.integers[:, rows],
            dmin=None if self.dmin is None else self.dmin[:, rows],
            lows=None if self.lows is None else self.lows[:, rows],
        )

    def _spread(self, by_group: Tensor) -> Tensor:
        """[groups, out_features] -> [columns, out_features], a copy."""
        return by_group.repeat_interleave(self.width, 0)

    def _refit_shared(self, old: Tensor, direction: Tensor, start: int, around: Surroundings) -> Tensor:
        """The least-squares factor of ``direction`` where its float16 is an improvement; the values follow."""
        columns = slice(start, start + self.span)
        slope = (direction * around.gradient[columns]).sum(0)
        curvature = (direction * (around.hessian[columns, columns] @ direction)).sum(0)
        new = as_half(old + slope * reciprocal(curvature))
        if self.dmin is not None:
            new = new.clamp_(min=0.0) + 0.0  # clamping may leave -0
        by = new - old
        better = by * (2.0 * slope - by * curvature) > 0.0
        by.masked_fill_(~better, 0.0)
        around.put(start, around.values[columns] + direction * by)
        return torch.where(better, new, old)

    def _nearest_step(self, group: int, wanted: Tensor) -> Tensor:
        d = self.d[group // self.count] * self.unit
        return d * self.nearest(wanted * reciprocal(d))

    def _nearest_base(self, group: int, wanted: Tensor) -> Tensor:
        assert self.dmin is not None
        dmin = self.dmin[group // self.count]
        return -(dmin * (-wanted * reciprocal(dmin)).round_().clamp_(0.0, self.top))

    def _take(self, group: int, steps: Tensor, bases: Tensor | None) -> None:
        Scales._take(self, group, steps, bases)
        d = self.d[group // self.count] * self.unit
        self.integers[group] = torch.where(d == 0.0, self.integers[group], (steps * reciprocal(d)).round_())
        if bases is not None and self.dmin is not None and self.lows is not None:
            dmin = self.dmin[group // self.count]
            self.lows[group] = torch.where(dmin == 0.0, self.lows[group], (-bases * reciprocal(dmin)).round_())
