"""What calibration keeps of a linear's inputs: how many tokens, their second moments, channel magnitudes, the peak.

Second moments are the Hessian ``X^T X`` of the squared error of the linear's output. GPTQ needs it as a whole. AWQ's
clipping needs the diagonal blocks that belong to one quantization group each: they say how much a weight error within a
group costs on the calibration tokens, exactly, for 2 % of the full Hessian's memory at 6144 inputs and groups of 128.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qconv.core.devices import CPU

MAX_BLOCK = 512
"""Widest block kept for clipping; a per-channel grid's rows are cut into blocks of at most this many inputs."""
_PANEL = 1024
"""Columns of a wide Hessian that are computed at once; the blocks below its diagonal are copies."""
_ROWS = 256
"""Rows that are squared at once, in float64."""


@dataclass(frozen=True, slots=True)
class InputSquares:
    """What was seen of a linear's inputs.

    Attributes:
        sums: float64 [in_features] on the host, sums of x^2 over the tokens.
        tokens: How many tokens.
    """

    sums: Tensor
    tokens: int

    @classmethod
    def of(cls, inputs: Tensor) -> InputSquares:
        """Of some tokens' inputs, float32 [tokens, in_features]."""
        sums = torch.zeros(inputs.shape[-1], dtype=torch.float64, device=inputs.device)
        for start in range(0, len(inputs), _ROWS):
            sums += inputs[start : start + _ROWS].double().square_().sum(dim=0)
        return cls(sums.cpu(), len(inputs))

    @classmethod
    def empty(cls, in_features: int) -> InputSquares:
        """Of no tokens."""
        return cls(torch.zeros(in_features, dtype=torch.float64, device=CPU), 0)

    def __add__(self, other: InputSquares) -> InputSquares:
        return InputSquares(self.sums + other.sums, self.tokens + other.tokens)


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
        peak: The largest ``|x|``.
        drift: float32 [in_features, in_features], the mean over tokens of ``(r - x) x^T``, r being the unquantized
            model's input for the token; None where that is not looked at.
    """

    tokens: float
    gram: Tensor
    magnitude: Tensor
    peak: float = 0.0
    drift: Tensor | None = None

    @classmethod
    def empty(cls, in_features: int, width: int, *, drift: bool = False, device: torch.device = CPU) -> InputStatistics:
        """No tokens yet, for blocks of ``width`` inputs; without second moments if that is 0."""
        blocks = in_features // width if width else 0
        drifted = torch.zeros(in_features, in_features, device=device) if drift else None
        gram = torch.zeros(blocks, width, width, device=device)
        return cls(0.0, gram, torch.zeros(in_features, device=device), drift=drifted)

    def to(self, device: torch.device) -> InputStatistics:
        """The same on a device; itself where it is there already."""
        if self.gram.device == device:
            return self
        drift = None if self.drift is None else self.drift.to(device)
        return InputStatistics(self.tokens, self.gram.to(device), self.magnitude.to(device), self.peak, drift)

    @property
    def hessian(self) -> Tensor:
        """float32 [in_features, in_features], the second moments as a whole, where one block holds them."""
        return self.gram.squeeze(0)

    def diagonal(self, width: int) -> Tensor:
        """The second moments in blocks of ``width``, which divides those that are kept; of width 0, none."""
        blocks, kept, _ = self.gram.shape
        if width in (kept, 0):
            return self.gram if width else self.gram[:0]
        parts = self.gram.view(blocks, kept // width, width, kept // width, width)
        return parts.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(-1, width, width)

    @property
    def squares(self) -> InputSquares:
        """The sums of squares that an importance matrix holds; there must be second moments."""
        sums = self.gram.diagonal(dim1=1, dim2=2).flatten().double() * self.tokens
        return InputSquares(sums.cpu(), round(self.tokens))

    def update(self, inputs: Tensor, weights: Tensor | None = None, reference: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            inputs: float32 [tokens, in_features].
            weights: What each counts in the second moments and magnitudes, float32 [tokens], 1 on average over all that
                will come; None for 1 each.
            reference: The unquantized model's inputs for the same tokens, where drift is looked at.
        """
        count = len(inputs)
        if count == 0:
            return
        total = self.tokens + count
        blocks, width, _ = self.gram.shape
        counted = inputs if weights is None else inputs * weights.unsqueeze(-1)
        # Running means keep their scale however many tokens come.
        self.gram.mul_(self.tokens / total)
        if width > _PANEL:
            self._add_in_panels(inputs, counted, 1.0 / total)
        elif width:
            grouped, other = (one.view(count, blocks, width).transpose(0, 1) for one in (inputs, counted))
            self.gram.baddbmm_(other.transpose(1, 2), grouped, alpha=1.0 / total)
        if self.drift is not None and reference is not None:
            self.drift.mul_(self.tokens / total).addmm_((reference - inputs).t(), counted, alpha=1.0 / total)
        sizes = inputs.abs()
        self.peak = max(self.peak, float(sizes.max()))
        if weights is not None:
            sizes.mul_(weights.unsqueeze(-1))
        self.magnitude.mul_(self.tokens / total).add_(sizes.sum(0), alpha=1.0 / total)
        self.tokens = total

    def _add_in_panels(self, inputs: Tensor, counted: Tensor, factor: float) -> None:
        """Add ``factor * counted^T inputs``, which is symmetric: only what is not below the diagonal is computed."""
        for gram in self.gram:
            for start in range(0, len(gram), _PANEL):
                stop = start + _PANEL
                gram[start:stop, start:].addmm_(counted[:, start:stop].t(), inputs[:, start:], alpha=factor)
                gram[stop:, start:stop] = gram[start:stop, stop:].t()

    def shrunk(self, shared: InputStatistics, strength: float) -> InputStatistics:
        """Shrinkage toward shared statistics: ``(n own + k shared) / (n + k)`` with k = ``strength`` tokens.

        The shared tokens are taken not to have drifted. The own statistics are used up: second moments are not held
        twice.
        """
        if self.tokens + strength == 0.0:
            return shared
        share = strength / (self.tokens + strength)
        return InputStatistics(
            self.tokens + strength,
            self.gram.lerp_(shared.gram, share),
            self.magnitude.lerp_(shared.magnitude, share),
            max(self.peak, shared.peak),
            None if self.drift is None else self.drift.mul_(1.0 - share),
        )

    def shrink_drift(self) -> None:
        """Take one more token for each input feature not to have drifted.

        What a drift asks of the weights is a regression on ``in_features`` inputs, whose error falls with tokens over
        features: as many tokens as features say half, fewer say little.
        """
        if self.drift is not None:
            self.drift.mul_(self.tokens / (self.tokens + len(self.drift)))

    def without_moments(self) -> InputStatistics:
        """The same without second moments and drift."""
        return InputStatistics(self.tokens, self.gram.new_zeros(0, 0, 0), self.magnitude, self.peak)

    def rescaled(self, scale: Tensor) -> InputStatistics:
        """Statistics of ``x / scale``, scale float32 [in_features]; their peak is not known."""
        blocks, width, _ = self.gram.shape
        gram = self.gram
        if gram.numel():
            inverse = scale.reciprocal().view(blocks, width)
            gram = (gram * inverse.unsqueeze(-1)).mul_(inverse.unsqueeze(-2))
        drift = self.drift
        if drift is not None:
            drift = (drift / scale.unsqueeze(-1)).div_(scale)
        return InputStatistics(self.tokens, gram, self.magnitude / scale, math.nan, drift)
