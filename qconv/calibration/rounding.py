"""Rounding of a layer's linears by a build's method, given the statistics of their common input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from qconv.calibration.layer import LayerBuild
from qconv.calibration.schemes import GPTQ, Compensated, SecondMoments
from qconv.calibration.statistics import InputStatistics
from qconv.core.architecture import Linear
from qconv.core.hessian import Factor
from qconv.core.settings import GptqSettings
from qconv.methods import rounding_of

Factors: TypeAlias = dict[GptqSettings, dict[int, Factor]]
"""Of one input's second moments, as builds that fold nothing into it share them."""


def statistics_width(build: LayerBuild, linears: Sequence[Linear]) -> int:
    """The width of the blocks of second moments that rounding linears of one input needs; 0 for none."""
    in_features = linears[0].in_features
    if build.static is not None:
        return 0
    if any(build.rounding(one) is not None for one in linears):
        return in_features
    widths = {build.schemes[one.name].gram_width(in_features) for one in linears if one.name in build.schemes}
    widest = max(widths, default=0)
    # Narrower blocks are cut out of wider ones.
    return in_features if any(width and widest % width for width in widths) else widest


def empty_statistics(
    in_features: int, widths: Iterable[int], device: torch.device, *, drift: bool = False
) -> dict[int, InputStatistics]:
    """Statistics of one input in every width that builds ask for, by width; drift goes with second moments."""
    empty = InputStatistics.empty
    return {width: empty(in_features, width, drift=drift and bool(width), device=device) for width in {*widths}}


def compensate(
    build: LayerBuild,
    statistics: InputStatistics,
    weights: Mapping[str, Tensor],
    scale: Tensor | None = None,
    factors: Factors | None = None,
) -> dict[str, Compensated]:
    """Quantize by second moments the linears that share an input.

    Args:
        build: Whose they are.
        statistics: Of the input, second moments as one block; their drift, if any, is gone afterwards.
        weights: Their folded weights, float32 [out_features, in_features], by module name.
        scale: What the input is divided by, float32 [in_features]; None for nothing.
        factors: Those of the input as it is that other builds have made, or will need.

    Raises:
        QconvError: the second moments are not finite.
    """
    if not weights:
        return {}
    seen = statistics if scale is None else statistics.rescaled(scale)
    known = None if factors is None or scale is not None else factors.setdefault(build.recipe.gptq, {})
    known = {} if known is None else known
    pulls = {name: None if seen.drift is None else weight @ seen.drift for name, weight in weights.items()}
    seen.drift = statistics.drift = None
    moments: dict[str | None, SecondMoments] = {}
    found = {}
    for name, weight in weights.items():
        scheme = build.schemes[name]
        rounding = rounding_of(scheme.method)
        if rounding not in moments:
            moments[rounding] = SecondMoments(seen.hessian, build.recipe, known, rounding or GPTQ)
        found[name] = scheme.compensate(moments[rounding].target(weight, pulls.pop(name)), moments[rounding])
    return found
