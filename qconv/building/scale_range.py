"""Weights whose scales a file cannot hold: GPTQ's and AWQ's are float16, from 6.1e-5 to 65504."""

from __future__ import annotations

import torch

from qconv.artifacts.source import Source
from qconv.checkpoint.reader import Tensors
from qconv.core.architecture import Architecture, Linear
from qconv.core.qtensor import QTensor
from qconv.core.rounding import group_scales
from qconv.core.workers import Workers
from qconv.errors import RecipeError
from qconv.planning.fitting import skip_patterns
from qconv.planning.plan import BuildPlan


def check_scales(source: Source, plan: BuildPlan, workers: Workers) -> None:
    """Check that float16 holds the scales of weights that are to be rounded to integers; reads each of them once.

    Raises:
        CheckpointError: one is not finite.
        RecipeError: one needs scales beyond float16, or none of its scales is as large as float16's normal numbers.
    """
    pending = []
    for linear in plan.quantized:
        grid = plan.schemes[linear.name].grid
        if grid.scale_dtype is torch.float16 and not grid.is_float:
            pending.append(linear)

    def extremes(linear: Linear) -> tuple[float, float]:
        peak, largest = 0.0, 0.0
        for block in source.blocks(linear.weight):
            largest = max(largest, float(group_scales(block, plan.schemes[linear.name].grid).max()))
            peak = max(peak, float(block.abs().max()))
        return peak, largest

    for linear, (peak, largest) in zip(pending, workers.map(extremes, pending), strict=True):
        limits = torch.finfo(torch.float16)
        if largest > limits.max or 0.0 < largest < limits.smallest_normal:
            raise _error(source.checkpoint, source.architecture, linear, peak, f"needs scales of {largest:.3g}")


def require_storable(source: Tensors, architecture: Architecture, linear: Linear, weight: QTensor) -> None:
    """Find out whether a weight that came out wrong did so for its scales, which its dtype cuts off.

    Raises:
        RecipeError: half of its scales, or more, are the smallest, or one is the largest, that their dtype holds.
    """
    limits, scales = torch.finfo(weight.scales.dtype), weight.scales.float()
    small = float((scales <= limits.smallest_normal).float().mean())
    if weight.scales.dtype is torch.float16 and (small >= 0.5 or bool((scales >= limits.max).any())):
        peak = max(float(block.abs().max()) for block in source.blocks(linear.weight))
        raise _error(source, architecture, linear, peak, "has scales that float16 cuts off")


def _error(source: Tensors, architecture: Architecture, linear: Linear, peak: float, what: str) -> RecipeError:
    entry = source.entry(linear.weight)
    remedies = []
    if entry.dtype is not torch.float16:
        dtype = str(entry.dtype).removeprefix("torch.")
        remedies.append(f"Take --fmt w4a16, whose scales are {dtype} as the weights are")
    remedies.append("take --fmt fp8, whose scales are float32")
    patterns = skip_patterns(architecture, [linear.name])
    if patterns is not None:
        remedies.append(f"leave it alone: {patterns}")
    hint = "; or ".join(remedies)
    return RecipeError(
        f"{entry.file}: {linear.weight!r}, whose largest weight is {peak:.3g}, {what}: this format stores scales in "
        "float16, from 6.1e-05 to 65504.",
        hint=f"{hint[0].upper()}{hint[1:]}",
    )
