"""Bits per weight by layer and role: where a mixture spends what it has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

BITS = "bits_by_layer"
"""The key of a report of a mixture."""
_NUMBER = re.compile(r"\.\d+(?=\.)")
_GGUF = re.compile(r"blk\.(\d{1,9})\.(.+)\.weight")


@dataclass(slots=True)
class BitsByLayer:
    """Bytes and weights by layer and role, in the order in which they came."""

    _amounts: dict[int, dict[str, tuple[int, int]]] = field(default_factory=dict)

    def add(self, layer: int, role: str, nbytes: int, weights: int) -> None:
        """Count a module, or one of its tensors."""
        roles = self._amounts.setdefault(layer, {})
        before = roles.get(role, (0, 0))
        roles[role] = before[0] + nbytes, before[1] + weights

    @property
    def roles(self) -> list[str]:
        """Of all layers."""
        return list(dict.fromkeys(role for roles in self._amounts.values() for role in roles))

    def rows(self) -> dict[int, dict[str, float]]:
        """Bits per weight by layer and role; without what holds no weights."""
        return {
            layer: {role: 8.0 * nbytes / weights for role, (nbytes, weights) in roles.items() if weights}
            for layer, roles in sorted(self._amounts.items())
        }

    def values(self) -> list[dict[str, object]]:
        """For reports."""
        return [
            {"layer": layer, "roles": {role: round(bits, 4) for role, bits in roles.items()}}
            for layer, roles in self.rows().items()
        ]


def role_of(name: str) -> str:
    """A module's role, of its name within its layer: experts are one."""
    return _NUMBER.sub("", name)


def gguf_bits(tensors: Mapping[str, tuple[int, int]]) -> BitsByLayer:
    """Of a GGUF model's layers, given bytes and weights of each matrix by the name of its tensor."""
    found = BitsByLayer()
    for name, amount in tensors.items():
        placed = _GGUF.fullmatch(name)
        if placed is not None:
            found.add(int(placed[1]), placed[2], *amount)
    return found


def module_bits(modules: Iterable[tuple[str, int, int]]) -> BitsByLayer:
    """Of a checkpoint's layers, given the name, bytes and weights of each module or tensor."""
    found = BitsByLayer()
    for name, nbytes, weights in modules:
        _, separator, rest = name.partition("layers.")
        layer, _, within = rest.partition(".")
        if separator and layer.isdigit() and within:
            found.add(int(layer), role_of(within), nbytes, weights)
    return found
