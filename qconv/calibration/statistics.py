"""What calibration keeps of a linear's inputs: how many tokens, their second moments within groups, channel magnitudes.

The second moments are the diagonal blocks of the Hessian ``X^T X`` that belong to one quantization group each. They say
how much a weight error within a group costs on the calibration tokens, exactly, for 2 % of the full Hessian's memory at
6144 inputs and groups of 128.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_BLOCK = 512
"""Widest block kept; a per-channel grid's rows are cut into blocks of at most this many inputs."""


def block_width(in_features: int, group_width: int) -> int:
    """The width of the blocks for a grid whose groups are ``group_width`` wide."""
    if group_width <= MAX_BLOCK:
        return group_width
    return next(width for width in range(MAX_BLOCK, 0, -1) if in_features % width == 0)


@dataclass(slots=True)
class InputStatistics:
    """Running statistics of a linear's inputs.

    Attributes:
        tokens: How many tokens were seen (a weight, once shrunk toward other statistics).
        gram: float32 [blocks, width, width], the mean over tokens of ``x x^T`` within each block.
        magnitude: float32 [in_features], the mean over tokens of ``|x|``.
    """

    tokens: float
    gram: Tensor
    magnitude: Tensor

    @classmethod
    def empty(cls, in_features: int, width: int) -> InputStatistics:
        """No tokens yet, for blocks of ``width`` inputs."""
        return cls(0.0, torch.zeros(in_features // width, width, width), torch.zeros(in_features))

    def update(self, inputs: Tensor) -> None:
        """Add tokens: float32 [tokens, in_features]."""
        count = len(inputs)
        if count == 0:
            return
        total = self.tokens + count
        blocks, width, _ = self.gram.shape
        grouped = inputs.view(count, blocks, width).transpose(0, 1)
        # Running means keep their scale however many tokens come.
        self.gram.mul_(self.tokens / total)
        self.gram.baddbmm_(grouped.transpose(1, 2), grouped, alpha=1.0 / total)
        self.magnitude.mul_(self.tokens / total).add_(inputs.abs().sum(0), alpha=1.0 / total)
        self.tokens = total

    def shrunk(self, shared: InputStatistics, strength: float) -> InputStatistics:
        """Shrinkage toward shared statistics: ``(n own + k shared) / (n + k)`` with k = ``strength`` tokens."""
        if self.tokens + strength == 0.0:
            return shared
        share = strength / (self.tokens + strength)
        return InputStatistics(
            self.tokens + strength,
            torch.lerp(self.gram, shared.gram, share),
            torch.lerp(self.magnitude, shared.magnitude, share),
        )

    def rescaled(self, scale: Tensor) -> InputStatistics:
        """Statistics of ``x / scale``, scale float32 [in_features]."""
        blocks, width, _ = self.gram.shape
        inverse = scale.reciprocal().view(blocks, width)
        gram = self.gram * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
        return InputStatistics(self.tokens, gram, self.magnitude / scale)
