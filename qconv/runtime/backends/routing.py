"""Tokens brought to the experts that they chose, and what those answer brought back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ExpertFunction = Callable[[int, Tensor], Tensor]
"""Computes expert number e for its tokens, [tokens, hidden] to [tokens, hidden]."""


def routed(inputs: Tensor, chosen: Tensor, weights: Tensor, experts: int, expert: ExpertFunction) -> Tensor:
    """``sum_k weights[t, k] * expert(chosen[t, k], inputs[t])``, summed in float32.

    Args:
        inputs: [tokens, hidden].
        chosen: int64 [tokens, top_k].
        weights: [tokens, top_k].
        experts: How many there are.
        expert: Called once for each that a token chose, in their order.

    Returns:
        [tokens, hidden] in the inputs' dtype.
    """
    flat = chosen.flatten()
    order = torch.argsort(flat, stable=True)
    tokens = order // chosen.shape[1]
    counts = torch.bincount(flat, minlength=experts).tolist()
    scale = weights.flatten()[order].float().unsqueeze(-1)
    total = torch.zeros(inputs.shape, dtype=torch.float32, device=inputs.device)
    start = 0
    for number, count in enumerate(counts):
        if count:
            part = slice(start, start + count)
            answer = expert(number, inputs[tokens[part]])
            total.index_add_(0, tokens[part], answer.float() * scale[part])
            start += count
    return total.to(inputs.dtype)
