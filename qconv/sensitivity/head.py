"""The end of a pass: labels drawn from the model's distribution, and what their likelihood's gradient is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qconv.artifacts.source import Source
from qconv.core.architecture import Linear

WINDOW_LOGITS = 1 << 26
"""Logits that are made at once: 441 tokens of a vocabulary of 151,936."""
HEAD_ROWS = 8192
"""Rows of the head that are in memory at once."""


@dataclass(frozen=True, slots=True)
class Head:
    """The final norm and the head, which may be the embedding.

    Attributes:
        source: The model.
        norm: The final norm.
        linear: The head, or the embedding where it is tied.
        dtype: In which is computed.
    """

    source: Source
    norm: nn.Module
    linear: Linear
    dtype: torch.dtype = torch.float32

    @property
    def window(self) -> int:
        """Tokens that are worked on together."""
        return max(1, WINDOW_LOGITS // self.linear.out_features)

    def gradient(self, hidden: Tensor, chance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw a label for each token; the gradient of minus its log-likelihood.

        Args:
            hidden: The last layer's output, [tokens, hidden].
            chance: One number of [0, 1) for each token, float64 [tokens]: it decides the label.

        Returns:
            With regard to ``hidden``, [tokens, hidden]; the sum over tokens of its squares with regard to the logits,
            float64 [vocabulary]; that of the squared inputs of the head, float64 [hidden].

        Raises:
            CheckpointError: the head cannot be read or is not finite.
        """
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_(True)
            normed: Tensor = self.norm(leaf)
        logits = torch.empty(len(hidden), self.linear.out_features, dtype=self.dtype)
        for start, rows in self._rows():
            torch.matmul(normed.detach(), rows.t(), out=logits[:, start : start + len(rows)])
        probabilities = logits.softmax(-1)
        del logits
        labels = _drawn(probabilities, chance)
        slope = probabilities  # from here on: the gradient with regard to the logits
        slope[torch.arange(len(slope)), labels] -= 1.0
        pulled = torch.zeros_like(hidden)
        for start, rows in self._rows():
            pulled.addmm_(slope[:, start : start + len(rows)], rows)
        (found,) = torch.autograd.grad(normed, leaf, pulled)
        inputs = normed.detach().square().sum(0, dtype=torch.float64)
        return found, slope.square_().sum(0, dtype=torch.float64), inputs

    def _rows(self) -> Iterator[tuple[int, Tensor]]:
        start = 0
        for block in self.source.blocks(self.linear.weight):
            for first in range(0, len(block), HEAD_ROWS):
                rows = block[first : first + HEAD_ROWS].to(self.dtype)
                yield start, rows
                start += len(rows)


def _drawn(probabilities: Tensor, chance: Tensor) -> Tensor:
    """For each row the index at which its cumulated probabilities pass a number of [0, 1): int64 [rows]."""
    labels = torch.empty(len(probabilities), dtype=torch.int64)
    for row, one in enumerate(probabilities):
        passed = one.double().cumsum(0)
        label = int(torch.searchsorted(passed, chance[row] * passed[-1], right=True))
        labels[row] = min(label, len(one) - 1)
    return labels
