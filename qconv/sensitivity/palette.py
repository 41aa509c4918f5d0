"""What a build's linears can become, whatever its format: the protocol between the allocation and the formats.

The allocation knows units, names and bytes. A palette knows what the names stand for: types of GGUF
(:mod:`qconv.sensitivity.gguf_types`), integer schemes of compressed-tensors (:mod:`qconv.sensitivity.integer_schemes`).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from qconv.errors import UsageError

RecipeT = TypeVar("RecipeT", covariant=True)


@dataclass(frozen=True, slots=True)
class Part:
    """A linear of a unit.

    Attributes:
        linear: Under whose name its statistics are.
        weight: The name of its weight in the checkpoint, [out_features, in_features].
        is_embedding: Whether tokens read its rows, and its columns are what the model goes on with.
    """

    linear: str
    weight: str
    is_embedding: bool = False


@dataclass(frozen=True, slots=True)
class Unit:
    """What takes one grid as a whole: a tensor of GGUF, or linears that engines fuse.

    Attributes:
        name: Of the unit.
        layer: Its layer; None for the embedding and the head.
        role: What it is in its layer: ``attn_q``, ``mlp.experts`` ...
        groups: Its linears, those together that are alike but for the expert that they belong to.
        numel: Weights.
    """

    name: str
    layer: int | None
    role: str
    groups: tuple[tuple[Part, ...], ...]
    numel: int


@dataclass(frozen=True, slots=True)
class Extent:
    """How large a build is.

    Attributes:
        files: Bytes of all weight files, headers included.
        counted: Bytes of the tensors that bits per weight are counted over.
        weights: How many weights those tensors have.
    """

    files: int
    counted: int
    weights: int

    @property
    def bits(self) -> float:
        """Per weight."""
        return 8.0 * self.counted / self.weights


class Palette(Protocol[RecipeT]):
    """The grids that a format offers for a model's units, by name."""

    @property
    def units(self) -> Sequence[Unit]:
        """What a grid is chosen for, in file order."""

    def names(self, unit: Unit) -> Sequence[str]:
        """What a unit can become, at least one."""

    def size(self, unit: Unit, name: str) -> int:
        """Bytes of a unit's tensors."""

    def rounded(self, rows: Tensor, name: str, importance: Tensor) -> Tensor:
        """Rows after a grid's own rounding, float32 [rows, columns].

        Args:
            rows: float32 of the same shape; not changed.
            name: Of the grid.
            importance: float32 [columns], positive, what a squared error of each column counts.
        """

    def left(self, unit: Unit, name: str) -> float:
        """What the build's method leaves of the divergence that the grid's own rounding would cost."""

    def extent(self, chosen: Mapping[str, str]) -> Extent:
        """The size of a build, given each unit's grid by names."""

    def recipe_for(self, chosen: Mapping[str, str]) -> RecipeT:
        """Makes that build."""


def without(names: Sequence[str], excluded: Sequence[str]) -> tuple[str, ...]:
    """The names that no pattern of ``excluded`` fits; case does not count.

    Raises:
        UsageError: a pattern fits none, or all are excluded.
    """

    def fits(name: str, pattern: str) -> bool:
        return fnmatch.fnmatchcase(name.lower(), pattern.lower())

    for pattern in excluded:
        if not any(fits(name, pattern) for name in names):
            raise UsageError(f"--exclude-type {pattern!r}: is none of {', '.join(names)}.")
    left = tuple(name for name in names if not any(fits(name, pattern) for pattern in excluded))
    if not left:
        raise UsageError("--exclude-type: leaves no type to choose.", hint=f"There are {', '.join(names)}.")
    return left
