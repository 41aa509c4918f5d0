"""Which part of a build costs most: single parts of it stand in the reference, and the divergence of each is measured.

First every layer as a whole, then the parts of the layers that cost most: attention, router, norms, every expert. A
part's neighbours come from the reference, in the coordinates that AWQ folded the layer into, so that what is measured
is the part's error alone. The costs of parts need not add up to the build's: errors cancel and compound.

So the dearest parts are measured the other way round too: what their layer costs with that part alone taken from the
reference. Where a part is to blame the layer gets cheaper without it. A router and experts that were permuted together
cost nothing, each of them alone costs much, and the layer gets dearer without either.

Beside a baseline, a build that was good enough, every cost is how much more than there: what sound rounding costs
anyway does not hide what was damaged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from qconv.core.architecture import Layer
from qconv.evaluation.mixing import Part, outside_layers, parts_of, whole_layers
from qconv.evaluation.statistics import ratio_standard_error
from qconv.evaluation.variants import Sums, Variants
from qconv.folders.ownership import own_folder
from qconv.models.folding import Folds
from qconv.runtime.files import ModelFiles

CONFIRMED = 5
"""Parts of each layer looked into that are measured the other way round too."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Suspect:
    """A build that is looked into, and what it folded into its layers."""

    files: ModelFiles
    folds: Callable[[Layer], Folds]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a part of the build costs where all else is the reference's.

    Attributes:
        part: The part.
        kld: Mean KL divergence from the reference, nats a token; beside a baseline, how much more than there.
        error: Its standard error over sequences.
        without: What the part's layer of the build costs with this part alone taken from the reference, as ``kld``;
            None where that was not measured.
    """

    part: Part
    kld: float
    error: float
    without: float | None = None


@dataclass(frozen=True, slots=True)
class Blame:
    """Costs, the largest first.

    Attributes:
        whole: Of the build as a whole.
        layers: Of every layer, and of what is outside of layers.
        parts: Of the parts within the layers that cost most.
        tokens: Tokens that were scored.
    """

    whole: Cost
    layers: tuple[Cost, ...]
    parts: tuple[Cost, ...]
    tokens: int

    def as_values(self) -> dict[str, Any]:
        """Ready for JSON."""

        def values(cost: Cost) -> dict[str, Any]:
            found = {"part": cost.part.name, "layer": cost.part.layer, "kld": cost.kld, "error": cost.error}
            return found if cost.without is None else {**found, "layer_without": cost.without}

        return {
            "tokens": self.tokens,
            "whole": values(self.whole),
            "layers": [values(one) for one in self.layers],
            "parts": [values(one) for one in self.parts],
        }


def find_blame(
    reference: ModelFiles,
    build: Suspect,
    sequences: Sequence[Tensor],
    scratch: Path,
    *,
    baseline: Suspect | None = None,
    worst_layers: int = 2,
    device: str = "cpu",
    progress: Progress,
) -> Blame:
    """Measure the cost of every layer of a build, then of the parts of the worst ones.

    Neither model is ever held in memory (:mod:`qconv.evaluation.variants`).

    Args:
        reference: The unquantized model.
        build: The build.
        sequences: Token ids, int64 [length] each.
        scratch: An empty folder with room for activations, the caller's to remove.
        baseline: A build of the same reference that costs are compared with.
        worst_layers: So many layers are looked into.
        device: A torch device.
        progress: Told what is at work, how many steps of it are done, and how many there are.

    Raises:
        CheckpointError: the two are not the same model, or damaged.
        OutputError: the scratch folder is full.
    """
    measured = []
    for number, one in enumerate([build] if baseline is None else [build, baseline]):
        folder = scratch / str(number)
        own_folder(folder)
        measured.append(Variants(reference, one.files, one.folds, sequences, folder, device))
    bench = _Bench(measured, progress)
    architecture = reference.architecture
    layers = [*whole_layers(architecture), *outside_layers(architecture)]
    everything = Part("build", None, frozenset().union(*(layer.modules for layer in layers)))
    whole, *others = bench.costs("layers", [everything, *layers], [one.modules for one in (everything, *layers)])
    costs = sorted(others, key=_dearest)

    wholes = {layer.layer: layer.modules for layer in layers if layer.layer is not None}
    worst = [one.part.layer for one in costs if one.part.layer is not None][:worst_layers]
    inside = [part for index in worst for part in parts_of(architecture.layers[index])]
    parts = sorted(bench.costs("parts of the dearest layers", inside, [one.modules for one in inside]), key=_dearest)

    suspects = [one for index in worst for one in [cost for cost in parts if cost.part.layer == index][:CONFIRMED]]
    rests = [wholes[one.part.layer] - one.part.modules for one in suspects if one.part.layer is not None]
    without = bench.costs("layers without their dearest parts", [one.part for one in suspects], rests)
    known = {one.part: one.kld for one in without}
    parts = [Cost(one.part, one.kld, one.error, known.get(one.part)) for one in parts]
    return Blame(whole, tuple(costs), tuple(parts), sum(map(len, sequences)))


def _dearest(cost: Cost) -> float:
    return -cost.kld


class _Bench:
    """Costs of parts of the first of one or two builds, less those of the same parts of the second."""

    def __init__(self, builds: Sequence[Variants], progress: Progress) -> None:
        self.builds = builds
        self.progress = progress
        self.lengths = np.array([len(one) for one in builds[0].sequences], dtype=np.float64)
        for one in builds:
            one.run_reference(lambda done, total: progress("the reference", done, total))

    def costs(self, what: str, parts: Sequence[Part], chosen: Sequence[Collection[str]]) -> list[Cost]:
        """For each part, what it costs where the chosen modules are the build's."""
        found = [one.divergences(chosen, lambda done, total: self.progress(what, done, total)) for one in self.builds]
        return [self._cost(part, sums) for part, *sums in zip(parts, *found, strict=True)]

    def _cost(self, part: Part, sums: Sequence[Sums]) -> Cost:
        # Sequence by sequence, so that the error is that of the difference.
        more = sums[0] if len(sums) == 1 else sums[0] - sums[1]
        return Cost(part, float(more.sum() / self.lengths.sum()), ratio_standard_error(more, self.lengths))
