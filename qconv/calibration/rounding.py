"""Rounding of a layer's linears by the recipe's method, given the statistics of their common input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qconv.calibration.layer import LayerContext
from qconv.calibration.statistics import InputStatistics, block_width
from qconv.core.qtensor import QTensor
from qconv.grids import e4m3
from qconv.methods import gptq
from qconv.methods.gptq import GptqResult


def statistics_width(context: LayerContext, in_features: int) -> int:
    """The width of the blocks of second moments that rounding a linear of ``in_features`` needs; 0 for none."""
    if context.grid.is_float:
        return 0
    if "gptq" in context.recipe.method:
        return in_features
    return block_width(in_features, context.grid.width(in_features))


def compensate(
    context: LayerContext, statistics: InputStatistics, weights: Mapping[str, Tensor]
) -> dict[str, GptqResult]:
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
    settings, hessian = context.recipe.gptq, statistics.hessian
    clip = context.recipe.clip if context.recipe.searches_clipping else None
    factor = gptq.factorize(hessian, settings)
    return {
        name: gptq.quantize(weight, context.grid, hessian, settings, clip, factor) for name, weight in weights.items()
    }


def compensation_record(result: GptqResult) -> dict[str, Any]:
    """What the report says of one linear: its error on the calibration tokens, and whatever was out of the ordinary."""
    record: dict[str, Any] = {"error": result.error, "rtn_error": result.rtn_error}
    if result.escalations:
        record["damp_percent"] = result.damp_percent
    if result.dead_columns:
        record["dead_columns"] = result.dead_columns
    if result.kept_rtn:
        record["rows_kept_rtn"] = result.kept_rtn
    return record


def scale_activations(context: LayerContext, peak: float, weights: Mapping[str, Tensor]) -> dict[str, QTensor]:
    """Quantize to a float grid with static activations the linears that share an input.

    They share the weights' scale too: engines fuse them and would round all but one of them again, to the largest.

    Args:
        context: The layer.
        peak: The input's largest magnitude on the calibration tokens.
        weights: Their weights, float32 [out_features, in_features], by module name.
    """
    if not weights:
        return {}
    clip = context.recipe.clip if context.recipe.searches_clipping else None
    fused = e4m3.quantize(
        torch.cat(list(weights.values())), context.grid, clip, e4m3.activation_scale(torch.tensor(peak))
    )
    found, start = {}, 0
    for name, weight in weights.items():
        found[name] = fused.rows(start, start + len(weight))
        start += len(weight)
    return found
