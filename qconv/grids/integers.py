"""Rounding to nearest on integer grids, with an optional search of each group's range by mean squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from qconv.core.qtensor import Grid, QTensor
from qconv.core.rounding import (
    clip_ratios,
    decode_,
    encode_,
    group_range,
    range_parameters,
    round_to_nearest,
    row_blocks,
)
from qconv.core.settings import ClipSettings


def quantize(weight: Tensor, grid: Grid, clip: ClipSettings | None = None) -> QTensor:
    """Round a weight to nearest on the grid.

    Args:
        weight: [out_features, in_features], any float dtype; not changed.
        grid: The grid.
        clip: Search each group's clipping range for the least squared error of its weights; None takes the full range.
    """
    if clip is None:
        return round_to_nearest(weight, grid)
    blocks = (weight[start:stop] for start, stop in row_blocks(*weight.shape))
    ratios = torch.cat([mse_ratios(block, grid, clip) for block in blocks])
    return round_to_nearest(weight, grid, ratios)


def mse_ratios(block: Tensor, grid: Grid, clip: ClipSettings) -> Tensor:
    """For each group the ratio of its range with the least squared error, float32 [rows, groups].

    Ties go to the larger ratio, so a group that clipping does not help keeps its full range.
    """
    rows, columns = block.shape
    source = block.float().view(rows, grid.groups(columns), -1)
    best = torch.ones(source.shape[:2], device=block.device)
    least = torch.full(source.shape[:2], torch.inf, device=block.device)
    low, span = group_range(source, grid)
    for ratio in clip_ratios(clip):
        scales, zero_points = range_parameters(low * ratio, span * ratio, grid)
        rounded = encode_(source.clone(), scales, zero_points, grid)
        error = decode_(rounded, scales, zero_points, grid).sub_(source).square_().sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        best.masked_fill_(better, ratio)
    return best
