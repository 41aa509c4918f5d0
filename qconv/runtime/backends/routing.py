"""Tokens brought to the experts that they chose, and what those answer brought back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ExpertFunction = Callable[[int, Tensor], Tensor]
"""Computes expert number e for its tokens, [tokens, hidden] to [tokens, hidden]."""

_WINDOW = 4096
"""Answers that are widened to float32 at once."""


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
    answers = inputs[tokens]  # what an expert is asked, and in its place what it answers
    start = 0
    for number, count in enumerate(counts):
        if count:
            part = answers[start : start + count]
            part.copy_(expert(number, part))
            start += count
    scale = weights.flatten()[order].float().unsqueeze(-1)
    total = torch.zeros(inputs.shape, dtype=torch.float32, device=inputs.device)
    for start in range(0, len(tokens), _WINDOW):
        window = slice(start, start + _WINDOW)
        total.index_add_(0, tokens[window], answers[window].float() * scale[window])
    return total.to(inputs.dtype)
