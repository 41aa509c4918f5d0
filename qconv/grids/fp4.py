"""NVFP4 and MXFP4: E2M1 numbers whose scales are floats of eight bits.

MXFP4 scales 32 E2M1 numbers by a power of two (E8M0). NVFP4 scales 16 by an E4M3 number, and all by one float32 more.

That one is taken to be a power of two here: then products of codes and scales are exact in float32, and formats that
store it and formats that store its inverse hold the same weight.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qconv.core.grid import Fit
from qconv.core.qtensor import E2M1_MAGNITUDES, Grid, QTensor
from qconv.core.rounding import row_blocks
from qconv.errors import UsageError
from qconv.grids.nearest import E2M1
from qconv.grids.scales import Scales
from qconv.grids.steps import StepFit

NVFP4 = Grid(4, 16, True, torch.float8_e4m3fn, "e2m1")
MXFP4 = Grid(4, 32, True, torch.float8_e8m0fnu, "e2m1")
"""What formats hold of the two where they leave inputs as they are."""

_SCALE_MAX = 448.0
_SCALE_MIN = 2.0**-9
"""The smallest positive E4M3 number: a group of zeros has it, since some readers divide by scales."""
_BIAS = 127
_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 1.05, 1.1, 1.2, 1.35, 1.5)
"""What NVFP4's search tries of the scale that puts a group's largest weight at 6. Below 1 it is cut off; above, it may
come to lie at 5, between 4 and 6, or all weights where values are denser."""
_EXPONENTS = (0, 1, -1)
"""What MXFP4's search adds to the exponent that puts a group's largest weight between 4 and 8."""
_LEAST_IMPORTANCE = 1e-6
_ROOM = 16.0
"""By what weights may exceed what their global scale was taken from: matched calibration moves them, and what it moves
too far is cut off. More is no weight of that scale."""


@dataclass(frozen=True, slots=True)
class Nvfp4Grid:
    """NVFP4.

    Attributes:
        search: Each group's scale is searched for the least squared error; False puts its largest weight at 6.
        global_scale: For linears that engines hold as one and so must share it; None for the weight's own.
        grid: What the format holds.
    """

    search: bool = True
    global_scale: float | None = None
    grid: Grid = NVFP4

    @property
    def name(self) -> str:
        """As formats call it."""
        return "NVFP4"

    def shared(self, largest: float) -> Nvfp4Grid:
        """The grid of linears that share a global scale, the largest of whose weights has that magnitude."""
        return replace(self, global_scale=global_scale(largest))

    def encode(self, weight: Tensor, importance: Tensor | None = None) -> QTensor:
        """See :class:`qconv.core.grid.FittedGrid`."""
        _require_groups(weight, self.grid.group_size)
        largest = largest_magnitude([weight])
        shared = global_scale(largest) if self.global_scale is None else self.global_scale
        if not 0.0 < shared < math.inf or largest / shared > _ROOM * E2M1.highest * _SCALE_MAX:
            raise UsageError(f"NVFP4: the global scale {shared:g} does not suit weights up to {largest:g}.")
        parts = []
        for start, stop in row_blocks(*weight.shape):
            groups = weight[start:stop].float().view(stop - start, -1, self.grid.group_size)
            wanted = groups.abs().amax(2) / (E2M1.highest * shared)
            tried = (_as_e4m3(wanted * ratio) for ratio in (_RATIOS if self.search else (1.0,)))
            parts.append(_best(groups, tried, functools.partial(_global, shared=shared), importance))
        codes, scales = (torch.cat(part) for part in zip(*parts, strict=True))
        return QTensor(self.grid, codes, scales.to(torch.float8_e4m3fn), None, global_scale=shared)

    def fit(self, weight: Tensor, encoded: QTensor) -> Fit[QTensor]:
        """See :class:`qconv.core.grid.FittedGrid`."""
        shared = encoded.global_scale
        return _fit(
            encoded,
            lambda steps: _global(_as_e4m3(steps / shared), shared),
            lambda steps: (steps / shared).to(torch.float8_e4m3fn),
        )


@dataclass(frozen=True, slots=True)
class Mxfp4Grid:
    """MXFP4.

    Attributes:
        search: Each group's exponent is searched for the least squared error; False puts its largest weight between 4
            and 8, what is beyond 6 becoming 6 (OCP Microscaling Formats 1.0, section 6.3).
        grid: What the format holds.
    """

    search: bool = True
    grid: Grid = MXFP4

    @property
    def name(self) -> str:
        """As formats call it."""
        return "MXFP4"

    def encode(self, weight: Tensor, importance: Tensor | None = None) -> QTensor:
        """See :class:`qconv.core.grid.FittedGrid`."""
        _require_groups(weight, self.grid.group_size)
        parts = []
        for start, stop in row_blocks(*weight.shape):
            groups = weight[start:stop].float().view(stop - start, -1, self.grid.group_size)
            # A float's exponent, exact where a logarithm may not be; of 0 and what is below float32's normal numbers
            # the lowest.
            exponents = (groups.abs().amax(2).view(torch.int32) >> 23) - _BIAS - 2
            tried = (_within(exponents + change) for change in (_EXPONENTS if self.search else (0,)))
            parts.append(_best(groups, tried, _power_of_two, importance))
        codes, exponents = (torch.cat(part) for part in zip(*parts, strict=True))
        return QTensor(self.grid, codes, _stored(exponents), None)

    def fit(self, weight: Tensor, encoded: QTensor) -> Fit[QTensor]:
        """See :class:`qconv.core.grid.FittedGrid`."""
        return _fit(encoded, _nearest_power, lambda steps: _stored(_exponent(steps)))


def grid_of(grid: Grid, *, search: bool = True) -> Nvfp4Grid | Mxfp4Grid:
    """What puts weights on a format's grid of E2M1 floats."""
    return Nvfp4Grid(search, grid=grid) if grid.has_global_scale else Mxfp4Grid(search, grid)


def global_scale(largest: float) -> float:
    """The power of two that lets all of E4M3 scale weights up to ``largest`` in magnitude; a number of float32."""
    if largest == 0.0:
        return 1.0
    exponent = math.ceil(math.log2(largest / (E2M1.highest * _SCALE_MAX)))
    return float(2.0 ** min(max(exponent, -126), 127))


def local_scale(peak: float) -> Tensor:
    """What inputs are divided by where the scales of their groups are E4M3 numbers, float64 []; 1 for inputs of 0."""
    return torch.tensor(peak / (E2M1.highest * _SCALE_MAX) or 1.0, dtype=torch.float64)


def largest_magnitude(weights: Iterable[Tensor]) -> float:
    """Of all weights that share a global scale."""
    return max((float(weight.abs().amax()) for weight in weights if weight.numel()), default=0.0)


def codes_of(values: Tensor) -> Tensor:
    """E2M1 numbers as codes: float32 -> uint8 of the same shape; zero is positive."""
    places = torch.bucketize(values.abs().contiguous(), torch.tensor(E2M1_MAGNITUDES), out_int32=True).to(torch.uint8)
    return places | (values < 0.0).to(torch.uint8) << 3


def _fit(encoded: QTensor, store: Callable[[Tensor], Tensor], stored: Callable[[Tensor], Tensor]) -> Fit[QTensor]:
    steps = encoded.steps().t().contiguous()

    def packed(scales: Scales, values: Tensor) -> QTensor:
        codes = torch.cat([codes_of(found.t()) for _, _, found in scales.by_rows(values)])
        return replace(encoded, codes=codes, scales=stored(scales.steps.t()).contiguous())

    return StepFit(Scales(width=encoded.grid.group_size, steps=steps, bases=None, store=store), E2M1, packed)


def _best(
    groups: Tensor, tried: Iterable[Tensor], steps: Callable[[Tensor], Tensor], importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes uint8 [rows, columns], and of the tried scales [rows, groups] those with the least squared error.

    Ties go to the scale that was tried first.
    """
    weights = None if importance is None else _normalized(importance).view(-1, groups.shape[2])

    def error(scales: Tensor) -> Tensor:
        wrong = _rounded(groups, steps(scales)).mul_(steps(scales).unsqueeze(2)).sub_(groups).square_()
        return (wrong if weights is None else wrong.mul_(weights)).sum(2)

    def better(best: tuple[Tensor, Tensor], other: Tensor) -> tuple[Tensor, Tensor]:
        scales, least = best
        errors = error(other)
        return torch.where(errors < least, other, scales), torch.minimum(errors, least)

    first, *others = tried
    scales = functools.reduce(better, others, (first, error(first)))[0] if others else first
    return codes_of(_rounded(groups, steps(scales)).flatten(1)), scales


def _rounded(groups: Tensor, steps: Tensor) -> Tensor:
    """The nearest E2M1 numbers of groups in units of their steps."""
    return E2M1(groups / steps.unsqueeze(2))


def _normalized(importance: Tensor) -> Tensor:
    """With mean 1 and no zeros: a column that matters to nobody must still be approximated."""
    importance = importance.double()
    return (importance / importance.mean()).clamp_(min=_LEAST_IMPORTANCE).float()


def _as_e4m3(scales: Tensor) -> Tensor:
    """The nearest positive E4M3 numbers, as float32."""
    return scales.clamp(_SCALE_MIN, _SCALE_MAX).to(torch.float8_e4m3fn).float()


def _global(scales: Tensor, shared: float) -> Tensor:
    """What codes are multiplied by, as :meth:`QTensor.steps` has it."""
    return (scales.double() * shared).float()


def _within(exponents: Tensor) -> Tensor:
    """Of what E8M0 can hold: of its numbers down to the least normal float32."""
    return exponents.clamp(1 - _BIAS, _BIAS)


def _power_of_two(exponents: Tensor) -> Tensor:
    """Exactly: int32 from -127 to 127 -> float32."""
    normal = exponents.clamp(min=1 - _BIAS)
    # The lowest is no normal float32: half of the one above it.
    return (normal + _BIAS << 23).view(torch.float32) * torch.where(exponents < normal, 0.5, 1.0)


def _stored(exponents: Tensor) -> Tensor:
    """As E8M0 numbers."""
    return (exponents + _BIAS).to(torch.uint8).view(torch.float8_e8m0fnu)


def _exponent(powers: Tensor) -> Tensor:
    """Of powers of two, int32."""
    return (powers.contiguous().view(torch.int32) >> 23) - _BIAS


def _nearest_power(steps: Tensor) -> Tensor:
    """The power of two nearest to a positive number in the logarithm."""
    wanted = torch.log2(steps.clamp(min=2.0 ** (1 - _BIAS))).round_()
    return _power_of_two(_within(wanted).to(torch.int32))


def _require_groups(weight: Tensor, size: int) -> None:
    if weight.shape[1] % size:
        raise UsageError(
            f"groups of {size} do not divide {weight.shape[1]} input features", hint="Leave this linear unquantized."
        )
