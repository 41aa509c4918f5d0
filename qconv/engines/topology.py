"""How a linear divides over the ranks of tensor parallelism: the arithmetic that ``plan --tp`` and ``check`` share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """One side of a linear that ranks divide.

    Attributes:
        size: Its features.
        ranks: How many own a part of it.
        unit: Of how many features a part must be a multiple: those that share a scale or a word.
        what: ``input features`` or ``output features``.
    """

    size: int
    ranks: int
    unit: int
    what: str


def uneven(part: Part) -> str | None:
    """Why a rank's part is not whole, in words; None if it is."""
    unit = max(1, part.unit)
    if part.size % part.ranks == 0 and (part.size // part.ranks) % unit == 0:
        return None
    each = part.size / part.ranks
    return f"{part.size} {part.what} over {part.ranks} ranks are {each:g} each, not a multiple of {unit}"
