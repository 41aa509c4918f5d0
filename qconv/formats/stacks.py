"""Tensors of a file that hold those of several modules: all experts of a layer in one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qconv.checkpoint.header import TensorEntry, TensorSpec
from qconv.errors import CheckpointError
from qconv.formats.base import Format


@dataclass(frozen=True, slots=True)
class Stack:
    """A tensor [n / halves, halves * rows, ...] of n tensors [rows, ...] of modules.

    Attributes:
        name: What the file calls it.
        members: Those of modules, in their order: those whose rows come by turns are neighbours.
        halves: How many of them take turns, row by row; 1 where each has a place of the first axis to itself.
    """

    name: str
    members: tuple[TensorSpec, ...]
    halves: int

    @property
    def spec(self) -> TensorSpec:
        """What the file holds."""
        one = self.members[0]
        rows, *others = one.shape
        return TensorSpec(self.name, one.dtype, (len(self.members) // self.halves, self.halves * rows, *others))

    def together(self, parts: Sequence[Tensor]) -> Tensor:
        """The members of one place, each [rows, ...], as the file holds them, [1, halves * rows, ...]."""
        return torch.stack(tuple(parts), 1).flatten(0, 1).unsqueeze(0)

    def views(self, entry: TensorEntry) -> Iterator[TensorEntry]:
        """The members as views of a file.

        Args:
            entry: Where it holds the stack.

        Raises:
            CheckpointError: it is of another shape or dtype.
        """
        spec = self.spec
        if entry.shape != spec.shape or entry.dtype != spec.dtype:
            raise CheckpointError(
                f"{entry.file}: tensor {self.name!r} is {entry.dtype_name} {list(entry.shape)}, config.json implies "
                f"{str(spec.dtype).removeprefix('torch.')} {list(spec.shape)}.",
                hint="config.json belongs to another model, or the shard is wrong.",
            )
        outer, inner, *others = entry.steps
        for index, member in enumerate(self.members):
            number, half = divmod(index, self.halves)
            steps = (self.halves * inner, *others)
            yield entry.view(member.name, number * outer + half * inner, member.shape, steps)


def stacks(output_format: Format, specs: Iterable[TensorSpec]) -> list[Stack]:
    """The tensors of a format that hold several of ``specs``, in the order of the first of each.

    Raises:
        ValueError: tensors that are to lie in one are not alike, or one of them is missing.
    """
    found: dict[str, dict[tuple[int, int], TensorSpec]] = {}
    halves: dict[str, int] = {}
    for spec in specs:
        place = output_format.place(spec.name)
        if place is not None:
            found.setdefault(place.name, {})[place.number, place.half] = spec
            halves[place.name] = place.halves
    made = []
    for name, members in found.items():
        wanted = [divmod(index, halves[name]) for index in range(len(members))]
        if sorted(members) != wanted or len({(spec.dtype, spec.shape) for spec in members.values()}) > 1:
            raise ValueError(f"{name}: its parts are not alike, or one is missing")
        made.append(Stack(name, tuple(members[place] for place in wanted), halves[name]))
    return made
