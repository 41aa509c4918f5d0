"""NVFP4 and MXFP4: E2M1 numbers whose scales are floats of eight bits.

E2M1 (OCP Microscaling Formats 1.0, section 5.3.3) has the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6. MXFP4 scales 32 of
them by a power of two (E8M0). NVFP4 scales 16 by an E4M3 number, and all by one float32 more.

That one is taken to be a power of two here: then products of codes and scales are exact in float32, and formats that
store it and formats that store its inverse hold the same weight.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from qconv.core.grid import Fit
from qconv.core.rounding import row_blocks
from qconv.errors import UsageError
from qconv.grids.nearest import E2M1
from qconv.grids.scales import Scales
from qconv.grids.steps import StepFit

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""By the lower three bits of a code; the fourth is the sign."""
NVFP4_GROUP = 16
MXFP4_GROUP = 32

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


@dataclass(frozen=True, slots=True)
class Fp4Tensor:
    """A weight as E2M1 codes and scales.

    Attributes:
        codes: uint8 [out_features, in_features / 2], two in a byte, the even column in its lower half.
        scales: [out_features, groups]; float8_e4m3fn for NVFP4; for MXFP4 uint8, exponents of two plus 127.
        global_scale: float32 [], what NVFP4's scales are multiplied by; None for MXFP4.
    """

    codes: Tensor
    scales: Tensor
    global_scale: Tensor | None

    @property
    def kind(self) -> Literal["nvfp4", "mxfp4"]:
        """Which of the two it is."""
        return "mxfp4" if self.global_scale is None else "nvfp4"

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.codes.shape[0], self.codes.shape[1] * 2

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight, [out_features, in_features]: ``code * (scale * global_scale)`` in float32, cast to ``dtype``."""
        rows, columns = self.shape
        dense = torch.empty(rows, columns, dtype=dtype)
        steps = self.steps()
        for start, stop in row_blocks(rows, columns):
            values = unpack(self.codes[start:stop]).view(stop - start, steps.shape[1], -1)
            dense[start:stop] = values.mul_(steps[start:stop].unsqueeze(2)).view(stop - start, columns)
        return dense

    def steps(self) -> Tensor:
        """What codes are multiplied by, float32 [out_features, groups]."""
        if self.global_scale is None:
            return _power_of_two(self.scales.int() - _BIAS)
        return self.scales.float() * self.global_scale

    def with_rows(self, chosen: Tensor, other: Fp4Tensor) -> Fp4Tensor:
        """The same with the ``chosen`` rows, bool [out_features], of ``other``.

        Raises:
            ValueError: its global scale is another.
        """
        if not _same(self.global_scale, other.global_scale):
            raise ValueError("rows of a weight with another global scale cannot be taken over")
        codes = torch.where(chosen.unsqueeze(1), other.codes, self.codes)
        scales = torch.where(chosen.unsqueeze(1), other.scales.view(torch.uint8), self.scales.view(torch.uint8))
        return replace(self, codes=codes, scales=scales.view(self.scales.dtype))


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    return torch.equal(first, second) if first is not None and second is not None else first is second


@dataclass(frozen=True, slots=True)
class Nvfp4Grid:
    """NVFP4.

    Attributes:
        search: Each group's scale is searched for the least squared error; False puts its largest weight at 6.
        global_scale: float32 [], for linears that engines hold as one and so must share it; None for the weight's own.
    """

    search: bool = True
    global_scale: Tensor | None = None

    @property
    def name(self) -> str:
        """As formats call it."""
        return "NVFP4"

    def encode(self, weight: Tensor, importance: Tensor | None = None) -> Fp4Tensor:
        """See :class:`qconv.core.grid.FittedGrid`."""
        _require_groups(weight, NVFP4_GROUP)
        largest = largest_magnitude([weight])
        shared = global_scale(largest) if self.global_scale is None else self.global_scale
        # Others' amax / 2688 may be rounded down.
        if not bool((shared > 0.0) & shared.isfinite()) or largest / float(shared) > 1.001 * E2M1.highest * _SCALE_MAX:
            raise UsageError(f"NVFP4: the global scale {float(shared):g} does not suit weights up to {largest:g}.")
        parts = []
        for start, stop in row_blocks(*weight.shape):
            groups = weight[start:stop].float().view(stop - start, -1, NVFP4_GROUP)
            wanted = groups.abs().amax(2) / (E2M1.highest * shared)
            tried = (_as_e4m3(wanted * ratio) for ratio in (_RATIOS if self.search else (1.0,)))
            parts.append(_best(groups, tried, lambda scales: scales * shared, importance))
        codes, scales = (torch.cat(part) for part in zip(*parts, strict=True))
        return Fp4Tensor(codes, scales.to(torch.float8_e4m3fn), shared)

    def fit(self, weight: Tensor, encoded: Fp4Tensor) -> Fit[Fp4Tensor]:
        """See :class:`qconv.core.grid.FittedGrid`."""
        shared = encoded.global_scale
        assert shared is not None
        return _fit(
            encoded,
            NVFP4_GROUP,
            lambda steps: _as_e4m3(steps / shared) * shared,
            lambda steps: (steps / shared).to(torch.float8_e4m3fn),
        )


@dataclass(frozen=True, slots=True)
class Mxfp4Grid:
    """MXFP4.

    Attributes:
        search: Each group's exponent is searched for the least squared error; False puts its largest weight between 4
            and 8, what is beyond 6 becoming 6 (OCP Microscaling Formats 1.0, section 6.3).
    """

    search: bool = True

    @property
    def name(self) -> str:
        """As formats call it."""
        return "MXFP4"

    def encode(self, weight: Tensor, importance: Tensor | None = None) -> Fp4Tensor:
        """See :class:`qconv.core.grid.FittedGrid`."""
        _require_groups(weight, MXFP4_GROUP)
        parts = []
        for start, stop in row_blocks(*weight.shape):
            groups = weight[start:stop].float().view(stop - start, -1, MXFP4_GROUP)
            # A float's exponent, exact where a logarithm may not be; of 0 and what is below float32's normal numbers
            # the lowest.
            exponents = (groups.abs().amax(2).view(torch.int32) >> 23) - _BIAS - 2
            tried = (_within(exponents + change) for change in (_EXPONENTS if self.search else (0,)))
            parts.append(_best(groups, tried, _power_of_two, importance))
        codes, exponents = (torch.cat(part) for part in zip(*parts, strict=True))
        return Fp4Tensor(codes, (exponents + _BIAS).to(torch.uint8), None)

    def fit(self, weight: Tensor, encoded: Fp4Tensor) -> Fit[Fp4Tensor]:
        """See :class:`qconv.core.grid.FittedGrid`."""
        return _fit(encoded, MXFP4_GROUP, _nearest_power, lambda steps: (_exponent(steps) + _BIAS).to(torch.uint8))


def global_scale(largest: float) -> Tensor:
    """The power of two that lets all of E4M3 scale weights up to ``largest`` in magnitude, float32 []."""
    if largest == 0.0:
        return torch.ones(())
    exponent = math.ceil(math.log2(largest / (E2M1.highest * _SCALE_MAX)))
    return torch.tensor(2.0 ** min(max(exponent, -126), 127))


def largest_magnitude(weights: Iterable[Tensor]) -> float:
    """Of all weights that share a global scale."""
    return max((float(weight.abs().amax()) for weight in weights if weight.numel()), default=0.0)


def pack(values: Tensor) -> Tensor:
    """E2M1 numbers as codes, two in a byte: float32 [rows, columns] -> uint8 [rows, columns / 2]; zero is positive."""
    places = torch.bucketize(values.abs().contiguous(), torch.tensor(MAGNITUDES), out_int32=True).to(torch.uint8)
    codes = places | (values < 0.0).to(torch.uint8) << 3
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack(codes: Tensor) -> Tensor:
    """The inverse of :func:`pack`, float32 [rows, columns]."""
    table = torch.tensor([*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES)])
    return table[torch.stack([codes & 15, codes >> 4], 2).flatten(1).int()]


def _fit(
    encoded: Fp4Tensor, width: int, store: Callable[[Tensor], Tensor], stored: Callable[[Tensor], Tensor]
) -> Fit[Fp4Tensor]:
    steps = encoded.steps().t().contiguous()

    def packed(scales: Scales, values: Tensor) -> Fp4Tensor:
        codes = torch.cat([pack(found.t()) for _, _, found in scales.by_rows(values)])
        return Fp4Tensor(codes, stored(scales.steps.t()).contiguous(), encoded.global_scale)

    return StepFit(Scales(width=width, steps=steps, bases=None, store=store), E2M1, packed)


def _best(
    groups: Tensor, tried: Iterable[Tensor], steps: Callable[[Tensor], Tensor], importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes uint8 [rows, columns / 2], and of the tried scales [rows, groups] those with the least squared error.

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
    return pack(_rounded(groups, steps(scales)).flatten(1)), scales


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


def _within(exponents: Tensor) -> Tensor:
    """Of what E8M0 can hold: of its numbers down to the least normal float32."""
    return exponents.clamp(1 - _BIAS, _BIAS)


def _power_of_two(exponents: Tensor) -> Tensor:
    """Exactly: int32 from -127 to 127 -> float32."""
    normal = exponents.clamp(min=1 - _BIAS)
    # The lowest is no normal float32: half of the one above it.
    return (normal + _BIAS << 23).view(torch.float32) * torch.where(exponents < normal, 0.5, 1.0)


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
