"""The best build of a size: grids chosen by what ``qconv sensitivity`` measured."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

from qconv.artifacts.source import Source
from qconv.checkpoint.header import read_header
from qconv.checkpoint.reader import map_tensor
from qconv.core.workers import Workers
from qconv.errors import UsageError
from qconv.planning.allocation import Choice, choose, curve
from qconv.sensitivity.errors import Errors, divergence
from qconv.sensitivity.palette import Extent, Palette, Unit

RecipeT = TypeVar("RecipeT")
SENSITIVITY_NAME = "sensitivity.safetensors"
_POINTS = 12
"""Of the curve of sizes and losses."""


@dataclass(frozen=True, slots=True)
class Target:
    """How large the build is to be: bytes of all files, or bits per weight; one of them is None."""

    size: int | None = None
    bits: float | None = None

    def over(self, extent: Extent) -> int:
        """Bytes by which a build is larger than that; negative where it is smaller."""
        if self.size is not None:
            return extent.files - self.size
        assert self.bits is not None
        return extent.counted - math.floor(Fraction(self.bits) * extent.weights / 8)


@dataclass(frozen=True, slots=True)
class Request:
    """What grids are to be chosen for.

    Attributes:
        target: The size.
        excluded: Patterns of names that are not to be chosen.
        gradients: Whether the choice goes by the model's gradients, or by the errors of outputs alone.
    """

    target: Target
    excluded: tuple[str, ...] = ()
    gradients: bool = True

    def digest(self, recipe: str) -> str:
        """sha256, hexadecimal, of the request together with the digest of all else that is asked of the build."""
        return hashlib.sha256(json.dumps([recipe, asdict(self)], sort_keys=True).encode()).hexdigest()

    def values(self) -> dict[str, Any]:
        """For a build's report."""
        target = {"target_size": self.target.size, "target_bits": self.target.bits}
        return {
            **{name: value for name, value in target.items() if value is not None},
            "excluded_types": list(self.excluded),
        }


@dataclass(frozen=True, slots=True)
class Allocation(Generic[RecipeT]):
    """The best grids of a size.

    Attributes:
        units: What grids were chosen for.
        chosen: The grid of each by name.
        losses: What each is predicted to cost by itself.
        predicted: What the whole build is predicted to cost.
        is_divergence: Whether that is a mean KL divergence in nats; else it is an
            estimate of the logits' error relative to their mean square.
        extent: The build's size.
        recipe: Makes that build.
        curve: Sizes in bits per weight, and what is predicted there.
    """

    units: Sequence[Unit]
    chosen: Mapping[str, str]
    losses: Mapping[str, float]
    predicted: float
    is_divergence: bool
    extent: Extent
    recipe: RecipeT
    curve: Sequence[tuple[float, float]]

    def values(self) -> dict[str, Any]:
        """For reports: what is predicted, of this size and of others."""
        name = predicted_name(self.is_divergence)
        return {
            name: self.predicted,
            "bits_per_weight": self.extent.bits,
            "curve": [{"bits_per_weight": bits, name: loss} for bits, loss in self.curve],
        }


def predicted_name(is_divergence: bool) -> str:
    """What the loss of an allocation is called in reports."""
    return "predicted_kld" if is_divergence else "predicted_relative_error"


def read_sensitivity(path: Path) -> dict[str, Tensor]:
    """The statistics of a folder that ``qconv sensitivity`` made, or of the file in it.

    Raises:
        UsageError: there is none.
        CheckpointError: it is damaged.
    """
    return {name: map_tensor(entry) for name, entry in read_header(sensitivity_file(path)).items()}


def sensitivity_file(path: Path) -> Path:
    """The file of a folder that ``qconv sensitivity`` made, or that file itself.

    Raises:
        UsageError: there is none.
    """
    file = path / SENSITIVITY_NAME if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{path}: holds no sensitivity.", hint="Make it with qconv sensitivity MODEL -o OUT.")
    return file


def allocate(
    source: Source,
    statistics: Mapping[str, Tensor],
    palette: Palette[RecipeT],
    target: Target,
    workers: Workers,
) -> Allocation[RecipeT]:
    """Choose a grid for each unit: the least predicted loss that is not larger than the target.

    Args:
        source: The model.
        statistics: Of :func:`read_sensitivity`.
        palette: What is chosen from.
        target: The size.
        workers: Threads; each encodes samples of one unit.

    Raises:
        UsageError: even the smallest grids are too large, or there is nothing to choose.
        CheckpointError: the statistics are another model's.
    """
    least = require_reachable(palette, target)
    errors, units = Errors(source, statistics), palette.units
    choices = errors.of(palette, workers)
    smallest = sum(palette.size(unit, least[unit.name]) for unit in units)
    budget = smallest - target.over(palette.extent(least))
    while True:
        found = choose(choices, budget)
        assert found is not None
        chosen = {name: one.kind for name, one in found.items()}
        extent = palette.extent(chosen)
        over = target.over(extent)
        if over <= 0:
            break
        budget = max(smallest, budget - over)  # a longer header, or tensors aligned otherwise
    points = _curve(choices, extent, extent.counted - sum(one.size for one in found.values()))

    def total(loss: float) -> float:
        return divergence(loss, source.architecture) if errors.has_gradients else loss

    return Allocation(
        units,
        chosen,
        {name: one.loss for name, one in found.items()},
        total(sum(one.loss for one in found.values())),
        errors.has_gradients,
        extent,
        palette.recipe_for(chosen),
        [(bits, total(loss)) for bits, loss in points],
    )


def require_reachable(palette: Palette[Any], target: Target) -> dict[str, str]:
    """The smallest grid of each unit by names, which are known to be small enough, before anything is measured.

    Raises:
        UsageError: they are too large, or there is nothing to choose.
    """
    units = palette.units
    if not units:
        raise UsageError("--target-size, --target-bits: the recipe leaves nothing to choose.", hint="Take rules away.")
    least = {unit.name: min(palette.names(unit), key=partial(palette.size, unit)) for unit in units}
    smallest = palette.extent(least)
    if target.over(smallest) > 0:
        raise UsageError(
            f"the smallest build of these types has {smallest.files:,} bytes, {smallest.bits:.3f} bits per weight.",
            hint="Ask for a larger one, or exclude fewer types.",
        )
    return least


def _curve(choices: Mapping[str, Sequence[Choice[str]]], extent: Extent, fixed: int) -> list[tuple[float, float]]:
    low, high = (sum(pick(one.size for one in of) for of in choices.values()) for pick in (min, max))
    budgets = [low + (high - low) * point // (_POINTS - 1) for point in range(_POINTS)]
    return [(8 * (size + fixed) / extent.weights, loss) for size, loss in curve(choices, budgets)]
