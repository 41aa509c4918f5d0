"""AWQ: activation-aware scales and clipping (Lin et al. 2023, https://arxiv.org/abs/2306.00978, sections 3.2 and 3.3).

Scaling a weight's column by s > 1 before rounding, and its input by 1/s, shrinks that column's share of the rounding
error. Columns that see large activations are worth it. The scales are searched on a grid of exponents that holds the
identity, and the clipping range of each group on a grid that holds no clipping, so neither can lose by its own loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qconv.core.qtensor import Grid
from qconv.core.rounding import clip_ratios, decode_, encode_, group_range, range_parameters, row_blocks
from qconv.core.settings import ClipSettings

MAX_SCALE = 1e4
"""Bound on a scale and its reciprocal, so that folding never over- or underflows a 16-bit norm."""


def candidate_scales(magnitude: Tensor, points: int) -> list[Tensor]:
    """Scales ``magnitude ** alpha`` for alpha on ``points`` points of [0, 1], normalized; the first is the identity.

    Args:
        magnitude: float32 [channels], mean absolute activation of each input channel.
        points: Number of alphas.

    Returns:
        float32 [channels] each, with geometric mean of the extremes 1.
    """
    largest = magnitude.max()
    if float(largest) == 0.0 or not bool(torch.isfinite(magnitude).all()):
        return [torch.ones_like(magnitude)] * points
    # Relative to the largest, so that no product below leaves float32's range.
    base = (magnitude / largest).clamp_(min=1e-6)
    scales = []
    for step in range(points):
        scale = base ** (step / (points - 1))
        scale = scale / (scale.max() * scale.min()).sqrt()
        scales.append(scale.clamp_(1.0 / MAX_SCALE, MAX_SCALE))
    return scales


def nearest_power_of_two(scale: Tensor) -> Tensor:
    """Each scale rounded to a power of two, so that folding it changes exponents only and loses no bit."""
    return torch.exp2(torch.round(torch.log2(scale)))


@dataclass(frozen=True, slots=True)
class Choice:
    """The outcome of a scale search.

    Attributes:
        index: Index of the chosen candidate; 0 is the identity, plain rounding.
        alpha: Its exponent.
        loss: Its loss.
        rtn_loss: The identity's loss.
    """

    index: int
    alpha: float
    loss: float
    rtn_loss: float


def choose(losses: Sequence[float]) -> Choice:
    """The candidate with the least loss; the identity, the first, unless another is strictly better."""
    index = min(range(len(losses)), key=lambda number: losses[number] if losses[number] >= 0.0 else math.inf)
    if not losses[index] < losses[0]:
        index = 0
    return Choice(index, index / (len(losses) - 1), losses[index], losses[0])


def output_clip_ratios(weight: Tensor, grid: Grid, gram: Tensor, clip: ClipSettings) -> Tensor:
    """For each group the ratio of its range whose rounding error costs least at the output.

    The cost of a weight error d within a group is ``d^T H d`` with H the group's block of the inputs' second moments:
    the mean squared change of the output. Ties go to the larger ratio.

    Args:
        weight: float32 [out_features, in_features].
        grid: The grid.
        gram: float32 [blocks, width, width], blocks no wider than a group.
        clip: The search's settings.

    Returns:
        float32 [out_features, groups].
    """
    rows, columns = weight.shape
    groups = grid.groups(columns)
    blocks, width, _ = gram.shape
    best = torch.ones(rows, groups, device=weight.device)
    for start, stop in row_blocks(rows, columns):
        # Blocks first: the products with their Gram matrices are one batch without a transposition for each ratio.
        by_block = weight[start:stop].view(stop - start, blocks, width).transpose(0, 1).contiguous()
        source = by_block.view(groups, blocks // groups, stop - start, width)
        low, span = (part.unsqueeze(1) for part in group_range(source, grid, (1, 3)))
        least = torch.full((groups, stop - start), torch.inf, device=weight.device)
        chosen = torch.ones(groups, stop - start, device=weight.device)
        for ratio in clip_ratios(clip):
            scales, zero_points = range_parameters(low * ratio, span * ratio, grid)
            error = decode_(encode_(source.clone(), scales, zero_points, grid), scales, zero_points, grid).sub_(source)
            product = torch.bmm(error.view(blocks, -1, width), gram)
            cost = product.mul_(error.view_as(product)).sum(-1).view(groups, blocks // groups, -1).sum(1)
            better = cost < least
            least = torch.where(better, cost, least)
            chosen.masked_fill_(better, ratio)
        best[start:stop] = chosen.t()
    return best
