"""Tokens sorted by expert into tiles of rows, on the device and without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

from qconv.runtime.backends.cuda.products import Rows, row_tile


def route(chosen: Tensor, experts: int) -> Rows:
    """Rows for the experts' first product: row ``t * top_k + k`` is token t's k-th choice.

    How many tiles there are depends on values that only the device knows. So there are as many as there could be; those
    left over have expert -1.

    Args:
        chosen: int64 [tokens, top_k], at least one token.
        experts: How many there are.
    """
    flat = chosen.flatten()
    count = len(flat)
    tile = row_tile(-(-count // min(experts, count)))
    # Every expert's last tile may be a part of one, and no expert without rows has one.
    tiles = count // tile + min(experts, count)

    order = torch.argsort(flat, stable=True)
    sorted_experts = flat[order]
    counts = torch.zeros(experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
    ends = (counts + tile - 1).div(tile, rounding_mode="floor").cumsum(0)
    tiles_before = ends - (counts + tile - 1).div(tile, rounding_mode="floor")
    rows_before = counts.cumsum(0) - counts
    place = torch.arange(count, device=flat.device) - rows_before[sorted_experts] + tiles_before[sorted_experts] * tile
    ids = torch.full((tiles * tile,), count, dtype=torch.int32, device=flat.device)
    ids[place] = order.to(torch.int32)

    owner = torch.searchsorted(ends, torch.arange(tiles, device=flat.device), right=True)
    owner = torch.where(owner < experts, owner, -1).to(torch.int32)
    return Rows(count, chosen.shape[1], tile, ids, owner)
