"""Rules of a recipe: which linears are quantized otherwise than the rest, or not at all. The first that fits counts."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, PlainSerializer, Tag, field_validator, model_validator

from qconv.boundary.globs import MAX_LENGTH, names_module
from qconv.checkpoint.extended_rope import ExtendedRope
from qconv.core.number import Number
from qconv.core.settings import GridSettings, Section, positive_or_channel
from qconv.grids import grids
from qconv.planning.steps import known_method, shown_steps, steps

SKIP: Final = "skip"
"""In the place of a grid: left as it is."""
SHORT_GRIDS = "int4, int8, int4-g32, int8-channel, int4-g128-asym, fp8-channel, fp8-block, nvfp4, mxfp4, mxfp8 or skip"
"""Examples of grids as one word."""
_INTEGERS = re.compile(r"int([2348])(?:-g(\d{1,6})|-(channel))?(?:-(sym|asym))?")
_FLOATS: dict[str, tuple[Number, int, int]] = {
    "fp8-channel": ("e4m3", 8, -1),
    "fp8-block": ("e4m3", 8, 128),
    "mxfp8": ("e4m3", 8, 32),
    "nvfp4": ("e2m1", 4, 16),
    "mxfp4": ("e2m1", 4, 32),
}
"""What codes are, their bits, and how many share a scale; -1 for a whole row."""


class RuleGrid(Section):
    """What a rule says of a grid; keys that are not given are those of the recipe's own."""

    number: Number | None = None
    """What codes are: null for what the format holds where no rule says otherwise."""
    bits: Annotated[int, Field(ge=2, le=8)] | None = None
    """Of a code."""
    group_size: int | None = None
    symmetric: bool | None = None
    values: str | None = None

    @field_validator("group_size")
    @classmethod
    def _positive_or_channel(cls, value: int | None) -> int | None:
        return None if value is None else positive_or_channel(value)

    def over(self, settings: GridSettings) -> GridSettings:
        """A recipe's grid with what is said here in its place.

        Floats have, unless it is said, 8 bits and a scale a row (E4M3), or 4 bits and a scale for 16 (E2M1).
        """
        if self.number in ("e4m3", "e2m1"):
            bits, size = (8, -1) if self.number == "e4m3" else (4, 16)
            size = size if self.group_size is None else self.group_size
            return GridSettings(bits=self.bits or bits, group_size=size, symmetric=self.symmetric)
        given = {key: value for key, value in self.model_dump(exclude={"number"}).items() if value is not None}
        return settings.model_copy(update=given)


def _grid(value: Any) -> Any:
    """A grid written as one word, as the mapping that it stands for."""
    if not isinstance(value, str) or value == SKIP:
        return value
    if value in grids():
        return {"values": value}
    if value in _FLOATS:
        return dict(zip(("number", "bits", "group_size"), _FLOATS[value], strict=True))
    found = _INTEGERS.fullmatch(value)
    if found is None:
        raise ValueError(f"{value!r} is no grid; write {SHORT_GRIDS}, or a mapping of bits, group_size, symmetric")
    bits, size, channel, symmetry = found.groups()
    said: dict[str, Any] = {"number": "int", "bits": int(bits)}
    if size or channel:
        said["group_size"] = int(size) if size else -1
    return said | ({} if symmetry is None else {"symmetric": symmetry == "sym"})


class Match(Section):
    """What the rules of every kind of recipe have."""

    match: Annotated[str, Field(min_length=1, max_length=MAX_LENGTH)]
    """A shell pattern of a module's full name in the checkpoint, with a leading ``*.`` implied."""
    method: Annotated[tuple[str, ...] | None, BeforeValidator(steps), PlainSerializer(shown_steps)] = None
    """null: the recipe's."""

    def fits(self, module: str) -> bool:
        """Whether the rule is for a module, by its name."""
        return names_module(self.match, module)

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if value is None else known_method(value)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        grid = getattr(self, "grid", None)
        if grid is None and self.method is None:
            raise ValueError("says neither grid nor method")
        if grid == SKIP and self.method is not None:
            raise ValueError("skip and a method contradict each other")
        return self


def without_empty_rules(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values; without rules or rope those that it had before there were any, and so the same digest."""
    return {key: value for key, value in values.items() if key not in ("rules", "rope") or value}


def known_rope(value: str) -> str:
    """A recipe's ``rope`` in the one spelling of what it asks for.

    Raises:
        ValueError: it asks for nothing known.
    """
    return str(ExtendedRope.parse(value))


_GridOrSkip = Annotated[
    Annotated[RuleGrid, Tag("mapping")] | Annotated[Literal["skip"], Tag(SKIP)],
    Discriminator(lambda value: SKIP if value == SKIP else "mapping"),
]


class Rule(Match):
    """A rule of a recipe for safetensors."""

    grid: Annotated[_GridOrSkip | None, BeforeValidator(_grid)] = None
    """null: the recipe's."""
