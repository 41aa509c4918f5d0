"""What each grid would cost each unit of a build, predicted from samples of its rows.

Of a linear with output gradients' squares F and inputs' mean squares h, a weight error d costs about ``1/2 sum_r F_r
sum_c h_c d_rc^2``. Rows are drawn in proportion to F, so that a few dozen say what all of them cost; of a layer's
experts those are drawn that matter. Errors are those of the grid's own rounding with importance, times what the build's
method was measured to leave of the divergence at that grid: compensation hardly changes the order of grids.

Without gradients every row of a linear counts the same, and an error by what it has of the outputs' mean square,
``sum_rc h_c d_rc^2 / sum_rc h_c w_rc^2``: a noise-to-signal ratio and no divergence. Norms pass on relative errors of
the residual stream as they come, so an error counts the share that the linear's block has of the stream where it is
added, and of the head's errors, which are the logits', :data:`RESIDUAL`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qconv.artifacts.source import Source
from qconv.core.architecture import HEAD, Architecture, Moe
from qconv.core.workers import Workers
from qconv.errors import CheckpointError
from qconv.planning.allocation import Choice
from qconv.sensitivity.palette import Palette, Part, Unit
from qconv.sensitivity.sweep import INPUTS, OUTPUTS, SEEN, SHARE

ROWS = 96
"""Drawn of each linear."""
EXPERTS = 8
"""Drawn of each layer."""
RESIDUAL = 0.15
"""What a relative error of the residual stream counts of one of the logits, where there are no gradients. By Fisher's
information on the bundled model it is 0.3 for the embedding, and of blocks' shares 0.05 (o) to 0.2 (down)."""
ROUTING = 0.005
"""What routers add to a divergence, times its root: see :func:`divergence`. The least of what all linears in one type
showed on the bundled model, 0.005 to 0.011 over eight types (docs/evidence/quality.md)."""
_EXPONENT = 0.5
"""Columns count their inputs' mean square to this power when scales are searched, as in a build."""


@dataclass(frozen=True, slots=True)
class _Sample:
    """Some rows that stand for a linear, or for several.

    Attributes:
        rows: float32 [rows, columns].
        columns: What a squared error of each column counts, float32 [columns].
        importance: The same as the grid's search takes it.
        scale: What the mean over rows stands for.
    """

    rows: Tensor
    columns: Tensor
    importance: Tensor
    scale: float

    def cost(self, errors: Tensor) -> float:
        """Half the weighted square of rows' errors, float32 [rows, columns]."""
        return self.scale * 0.5 * float((errors.square() @ self.columns).mean())


@dataclass(frozen=True, slots=True)
class Errors:
    """Predicts what grids cost.

    Attributes:
        source: The model.
        statistics: What ``qconv sensitivity`` measured, by name.
    """

    source: Source
    statistics: Mapping[str, Tensor]

    @property
    def has_gradients(self) -> bool:
        """Whether costs are divergences, in nats; else they are estimates of the logits' relative error."""
        return any(name.endswith(f".{OUTPUTS}") for name in self.statistics)

    def of(self, palette: Palette[Any], workers: Workers) -> dict[str, list[Choice[str]]]:
        """The choices of each unit by name.

        Raises:
            CheckpointError: the statistics are another model's; a weight cannot be read.
        """
        units = palette.units

        def choices(unit: Unit) -> list[Choice[str]]:
            names = palette.names(unit)
            losses = self._losses(palette, unit, names)
            return [
                Choice(name, palette.size(unit, name), palette.left(unit, name) * loss)
                for name, loss in zip(names, losses, strict=True)
            ]

        return dict(zip((unit.name for unit in units), workers.map(choices, units), strict=True))

    def _losses(self, palette: Palette[Any], unit: Unit, names: Sequence[str]) -> list[float]:
        losses = [0.0] * len(names)
        for group in unit.groups:
            found, signal = [0.0] * len(names), 0.0
            for sample in self._samples(unit, group):
                signal += sample.cost(sample.rows)
                for at, name in enumerate(names):
                    rounded = palette.rounded(sample.rows, name, sample.importance)
                    found[at] += sample.cost(rounded.sub_(sample.rows))
            if not self.has_gradients:
                counts = self._share(group[0]) / signal if signal > 0.0 else 0.0
                found = [counts * one for one in found]
            losses = [loss + one for loss, one in zip(losses, found, strict=True)]
        return losses

    def _share(self, part: Part) -> float:
        """What a relative error of a linear's outputs counts of one of the logits."""
        if part.linear == HEAD:
            return 1.0
        return RESIDUAL * (1.0 if part.is_embedding else float(self._stat(part.linear, SHARE)))

    def _samples(self, unit: Unit, group: Sequence[Part]) -> Iterator[_Sample]:
        if group[0].is_embedding:
            yield self._of_embedding(group[0])
            return
        parts = [(self._rows_count(part), self._stat(part.linear, INPUTS)) for part in group]
        weights = torch.tensor([float(rows.sum()) * float(inputs.mean()) for rows, inputs in parts])
        if not float(weights.sum()) > 0.0:
            return
        for number, factor in _drawn(weights.double(), EXPERTS):
            rows, inputs = parts[number]
            total = float(rows.sum())
            if total > 0.0:
                seed = _generator(unit.name if len(unit.groups) == 1 else group[number].linear, number)
                chosen = torch.multinomial(rows, ROWS, replacement=True, generator=seed)
                importance = inputs.clamp(min=1e-12).pow(_EXPONENT)
                yield _Sample(self._rows(group[number], chosen), inputs, importance, factor * total)

    def _rows_count(self, part: Part) -> Tensor:
        """What a squared error of each output counts, float32 [out_features]."""
        if self.has_gradients:
            return self._stat(part.linear, OUTPUTS)
        rows = self.source.checkpoint.entry(part.weight).shape[0]
        return self._stat(part.linear, SEEN).float().expand(rows)

    def _of_embedding(self, part: Part) -> _Sample:
        counts = self._stat(part.linear, SEEN).double()
        chosen = torch.multinomial(counts, 4 * ROWS, replacement=True, generator=_generator(part.linear, 0))
        rows = self._rows(part, chosen)
        ones = torch.ones(rows.shape[1])
        return _Sample(rows, self._stat(part.linear, OUTPUTS) if self.has_gradients else ones, ones, 1.0)

    def _rows(self, part: Part, chosen: Tensor) -> Tensor:
        return self.source.checkpoint.gather(part.weight, chosen).float()

    def _stat(self, name: str, leaf: str) -> Tensor:
        key = f"{name}.{leaf}"
        if key not in self.statistics:
            raise CheckpointError(
                f"sensitivity: says nothing of {name}.",
                hint="It is of another model: run qconv sensitivity on this one.",
            )
        return self.statistics[key]


def divergence(loss: float, model: Architecture) -> float:
    """The mean KL divergence that losses by gradients come to in all.

    A gradient knows nothing of experts that are not chosen. Where two are all but equal for a token, any error makes
    the router take the other, with an effect that does not shrink with the error; how often that happens is in
    proportion to the error, which is the root of the loss. The order of builds does not depend on it.

    Args:
        loss: The sum over a build's linears.
        model: The architecture.
    """
    routed = any(isinstance(layer.mlp, Moe) for layer in model.layers)
    return loss + ROUTING * math.sqrt(loss) if routed else loss


def _drawn(weights: Tensor, most: int) -> list[tuple[int, float]]:
    """Which of several parts stand for all, and what each counts.

    All of them where they are few; else systematically, in proportion to their weights (Madow 1949), so that the sum
    over the drawn of their values times their factors is that over all on average.
    """
    if len(weights) <= most:
        return [(index, 1.0) for index in range(len(weights))]
    passed = weights.cumsum(0)
    step = float(passed[-1]) / most
    found = []
    for number in range(most):
        index = int(torch.searchsorted(passed, (number + 0.5) * step))
        found.append((index, step / float(weights[index])))
    return found


def _generator(name: str, part: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{name} {part}".encode()))
