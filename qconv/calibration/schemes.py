"""How one linear is rounded: what a layer's calibration asks of it, whatever its grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from qconv.calibration.statistics import block_width
from qconv.core.devices import CPU
from qconv.core.grid import FittedGrid, Packed
from qconv.core.hessian import Factor
from qconv.core.qtensor import Grid, QTensor
from qconv.core.rounding import fake_quantize, round_to_nearest, rounded_linear
from qconv.core.settings import MOST_MOVED, ClipSettings
from qconv.grids import e4m3, integers
from qconv.grids.elements import IntegerGrid
from qconv.grids.fp4 import Nvfp4Grid
from qconv.grids.of_formats import grid_of
from qconv.methods import awq, get_rounding, gptq, rounding_of
from qconv.methods.compensated.problem import SCALE_EXPONENT, Problem
from qconv.planning.recipe import Recipe
from qconv.planning.schemes import LinearScheme

GPTQ = "gptq"
"""The rounding that chooses scales of integers on the way."""


@dataclass(frozen=True, slots=True)
class Compensated:
    """A linear rounded by second moments: its weight, and what the report says of it."""

    weight: Packed
    record: dict[str, Any]


def dense(weight: Packed, device: torch.device) -> Tensor:
    """What a weight stands for, float32 [out_features, in_features], on a device, where codes are brought to."""
    if isinstance(weight, QTensor):
        return weight.to(device).dequantize()
    return weight.dequantize().to(device)


def placed(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """The same on a device, if there is one."""
    return None if tensor is None else tensor.to(device)


class Scheme(Protocol):
    """How one linear is rounded. Weights and what goes with them may lie on any device; packed ones are the host's."""

    @property
    def method(self) -> tuple[str, ...]:
        """By which steps: a member of :data:`qconv.planning.steps.METHODS`."""

    def shared(self, largest: float) -> Scheme:
        """The same for linears that engines hold as one matrix, whose largest weight has that magnitude."""

    def nearest(self, weight: Tensor) -> Tensor:
        """The weight after plain rounding, float32 [out_features, in_features]."""

    def linear(self, inputs: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
        """``inputs @ nearest(weight * scale).T``: float32 [tokens, in_features] -> [tokens, out_features].

        Args:
            inputs: Already divided by ``scale``.
            weight: [out_features, in_features], any float dtype; not changed.
            scale: Factors on its columns, float32 [in_features], or None.
        """

    def round(self, weight: Tensor) -> Packed:
        """The weight by plain rounding."""

    def clipped(self, weight: Tensor, gram: Tensor) -> Packed | None:
        """By plain rounding with the ranges that cost least, or None where none are searched.

        Args:
            weight: float32 [out_features, in_features].
            gram: Of its inputs; see :class:`InputStatistics`.
        """

    def gram_width(self, in_features: int) -> int:
        """The width of the blocks of second moments that ``clipped`` needs; 0 for none."""

    def compensate(self, weight: Tensor, moments: SecondMoments) -> Compensated:
        """By GPTQ.

        Raises:
            QconvError: the second moments are not finite.
        """


class SecondMoments:
    """Of the input that several linears share, and what they make of it once for all."""

    def __init__(
        self,
        hessian: Tensor,
        recipe: Recipe,
        factors: dict[int, Factor] | None = None,
        rounding: str = GPTQ,
    ) -> None:
        """Of float32 [in_features, in_features], the mean over tokens of ``x x^T``.

        ``factors`` are those that are known, or shared with whoever rounds on the same second moments; ``rounding`` is
        the name of what chooses codes.
        """
        self.hessian = hessian
        self._strength = recipe.calibration.matched_strength
        known = {} if factors is None else factors
        self.problem = Problem(hessian, recipe.gptq, recipe.refine, known, get_rounding(rounding))

    def target(self, weight: Tensor, pull: Tensor | None) -> Tensor:
        """What a weight is best rounded from, so that its output on the drifted input is that on the true one.

        The least squares of ``|T x - W r|^2`` over tokens, r being the unquantized model's input, are ``T = W + W D
        H^-1`` with ``D`` the mean of ``(r - x) x^T`` (GPTAQ, Li et al. 2025, https://arxiv.org/abs/2504.02692, section
        3, in closed form). No row moves by more than :data:`MOST_MOVED` of its norm.

        Args:
            weight: float32 [out_features, in_features]; not changed.
            pull: ``W D``, the same shape; None where drift is not looked at. It is a product of its own because the
                drift is as large as the second moments, and can be gone before those are factorized.
        """
        if pull is None:
            return weight
        factor = self.factor
        wanted = pull.index_select(1, factor.order)
        # H = s U diag(costs) U^T with s the mean of its diagonal, columns in the factor's order.
        scale = float(self.hessian.diagonal().mean(dtype=torch.float64)) or 1.0
        solved = torch.linalg.solve_triangular(factor.upper.t(), wanted, upper=False, left=False, unitriangular=True)
        solved.div_(factor.costs).mul_(self._strength / scale)
        solved = torch.linalg.solve_triangular(factor.upper, solved, upper=True, left=False, unitriangular=True)
        moved: Tensor = solved.index_select(1, torch.argsort(factor.order))
        # Few tokens say little of what lies between them, and can ask for anything there.
        length, most = torch.linalg.vector_norm(moved, dim=1), MOST_MOVED * torch.linalg.vector_norm(weight, dim=1)
        return moved.mul_((most / length.clamp(min=torch.finfo(torch.float32).tiny)).clamp_(max=1.0).unsqueeze(1)).add_(
            weight
        )

    @property
    def factor(self) -> Factor:
        """Of grids that round one column at a time."""
        return self.problem.factor(1)


@dataclass(frozen=True, slots=True)
class IntegerScheme:
    """On a grid of integers.

    Attributes:
        grid: The grid.
        recipe: Clipping and how GPTQ works.
        method: By which steps.
    """

    grid: Grid
    recipe: Recipe
    method: tuple[str, ...]

    @property
    def rounding(self) -> str | None:
        """What chooses its codes by second moments."""
        return rounding_of(self.method)

    @property
    def _clip(self) -> ClipSettings | None:
        return self.recipe.clip if self.recipe.clips(self.method) else None

    def shared(self, largest: float) -> IntegerScheme:
        """See :class:`Scheme`: every group has its own scale alone."""
        return self

    def nearest(self, weight: Tensor) -> Tensor:
        """See :class:`Scheme`."""
        return fake_quantize(weight, self.grid)

    def linear(self, inputs: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
        """See :class:`Scheme`."""
        return rounded_linear(inputs, weight, self.grid, scale)

    def round(self, weight: Tensor) -> Packed:
        """See :class:`Scheme`. A linear whose method is rounding has its clipping ranges searched here, if at all."""
        return integers.quantize(weight, self.grid, self._clip if self.method == ("rtn",) else None).to(CPU)

    def clipped(self, weight: Tensor, gram: Tensor) -> Packed | None:
        """See :class:`Scheme`."""
        if not self.gram_width(weight.shape[1]):
            return None
        ratios = awq.output_clip_ratios(weight, self.grid, gram, self.recipe.clip)
        return round_to_nearest(weight, self.grid, ratios).to(CPU)

    def gram_width(self, in_features: int) -> int:
        """See :class:`Scheme`."""
        if self._clip is None or self.method == ("rtn",):
            return 0
        return block_width(in_features, self.grid.width(in_features))

    def compensate(self, weight: Tensor, moments: SecondMoments) -> Compensated:
        """See :class:`Scheme`."""
        if self.rounding != GPTQ:
            return _on_fixed_scales(weight, IntegerGrid(self.grid, self._clip), moments)
        found = gptq.quantize(weight, self.grid, moments.hessian, self.recipe.gptq, self._clip, moments.factor)
        quantized, error, refine = found.qtensor.to(CPU), found.error, self.recipe.refine
        if refine.sweeps or refine.refits:
            quantized, error = moments.problem.refined(weight, IntegerGrid(self.grid), quantized)
        record = {"error": error, "rtn_error": found.rtn_error}
        return Compensated(quantized, record | extraordinary(moments.factor, found.kept_rtn))


@dataclass(frozen=True, slots=True)
class FittedScheme:
    """On a grid that fits scales by a search of its own."""

    grid: FittedGrid[Any]
    method: tuple[str, ...] = ("gptq",)

    def shared(self, largest: float) -> FittedScheme:
        """See :class:`Scheme`: their global scale, on a grid that has one."""
        return replace(self, grid=self.grid.shared(largest)) if isinstance(self.grid, Nvfp4Grid) else self

    def nearest(self, weight: Tensor) -> Tensor:
        """See :class:`Scheme`."""
        return dense(self.round(weight), weight.device)

    def linear(self, inputs: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
        """See :class:`Scheme`."""
        return inputs @ self.nearest(weight if scale is None else weight * scale).t()

    def round(self, weight: Tensor) -> Packed:
        """See :class:`Scheme`."""
        rounded: Packed = self.grid.encode(weight.cpu())
        return rounded

    def clipped(self, weight: Tensor, gram: Tensor) -> Packed | None:
        """By the grid's own search, each column counting the root of its inputs' mean square."""
        squares = gram.diagonal(dim1=1, dim2=2).flatten()
        if self.method == ("rtn",) or not bool((squares > 0.0).any()):
            return None
        found: Packed = self.grid.encode(weight.cpu(), squares.pow(SCALE_EXPONENT).cpu())
        return found

    def gram_width(self, in_features: int) -> int:
        """See :class:`Scheme`. The squares of the inputs alone, for an importance matrix."""
        return 1

    def compensate(self, weight: Tensor, moments: SecondMoments) -> Compensated:
        """See :class:`Scheme`."""
        return _on_fixed_scales(weight, self.grid, moments)


@dataclass(frozen=True, slots=True)
class StaticScheme:
    """On a grid of floats, with a stored scale of the inputs: rounding to nearest.

    Attributes:
        grid: The grid.
        recipe: Says whether the scale of the weights is searched.
    """

    grid: Grid
    recipe: Recipe

    def together(self, weights: Mapping[str, Tensor], peak: float) -> dict[str, Packed]:
        """Linears that share an input, by name.

        They share the weights' scale too: engines fuse them and would round all but one of them again, to the largest.

        Args:
            weights: float32 [out_features, in_features] each.
            peak: The input's largest magnitude on the calibration tokens.
        """
        if not weights:
            return {}
        clip = self.recipe.clip if self.recipe.clips(("rtn",)) else None
        scale = e4m3.activation_scale(torch.tensor(peak, device=CPU))
        fused = e4m3.quantize(torch.cat([weight.cpu() for weight in weights.values()]), self.grid, clip, scale)
        found, start = {}, 0
        for name, weight in weights.items():
            found[name] = fused.rows(start, start + len(weight))
            start += len(weight)
        return dict(found)


def scheme_of(planned: LinearScheme, recipe: Recipe) -> Scheme:
    """How linears on a grid of integers, or of floats without static activations, are rounded."""
    grid, method = planned.grid, planned.method
    if planned.values is None and not grid.is_float and not grid.based:
        return IntegerScheme(grid, recipe, method)
    return FittedScheme(grid_of(grid, planned.values, recipe.clip if recipe.clips(method) else None), method)


def _on_fixed_scales(weight: Tensor, grid: FittedGrid[Any], moments: SecondMoments) -> Compensated:
    found = moments.problem.quantize(weight, grid)
    record = {"error": found.error, "rtn_error": found.own_error}
    return Compensated(found.weight, record | extraordinary(found.factor, found.kept_own))


def extraordinary(factor: Factor, kept_rtn: int) -> dict[str, Any]:
    """What the report says of a compensation that was out of the ordinary."""
    record: dict[str, Any] = {}
    if factor.escalations:
        record["damp_percent"] = factor.damp_percent
    if factor.dead_columns:
        record["dead_columns"] = factor.dead_columns
    if kept_rtn:
        record["rows_kept_rtn"] = kept_rtn
    return record
