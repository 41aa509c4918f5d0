"""Rounding of a layer's linears by the recipe's method, given the statistics of their common input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from qconv.calibration.layer import LayerContext
from qconv.calibration.schemes import Compensated, SecondMoments
from qconv.calibration.statistics import InputStatistics
from qconv.core.architecture import Linear


def statistics_width(context: LayerContext, linears: Sequence[Linear]) -> int:
    """The width of the blocks of second moments that rounding linears of one input needs; 0 for none."""
    in_features = linears[0].in_features
    if context.static is not None:
        return 0
    if context.recipe.rounding is not None:
        return in_features
    widths = [context.schemes[one.name].gram_width(in_features) for one in linears if one.name in context.schemes]
    return max(widths, default=0)


def compensate(
    context: LayerContext, statistics: InputStatistics, weights: Mapping[str, Tensor]
) -> dict[str, Compensated]:
    """Quantize by GPTQ the linears that share an input.

    Args:
        context: The layer.
        statistics: Of the input, second moments as one block.
        weights: Their folded weights, float32 [out_features, in_features], by module name.

    Raises:
        QconvError: the second moments are not finite.
    """
    if not weights:
        return {}
    moments = SecondMoments(statistics.hessian, context.recipe, statistics.drift)
    return {name: context.schemes[name].compensate(moments.target(weight), moments) for name, weight in weights.items()}
