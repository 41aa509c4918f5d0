"""The steps of a method, as recipes write them."""

from __future__ import annotations

from typing import Any

from qconv.methods import roundings

METHODS = (("rtn",), ("awq",), *((name,) for name in roundings()), *(("awq", name) for name in roundings()))
"""What ``method`` may be: one method, or AWQ's scales followed by a rounding."""


def steps(value: Any) -> Any:
    """A list of names, one name, or names joined by ``+``."""
    if isinstance(value, list):
        return tuple(value)
    return tuple(value.split("+")) if isinstance(value, str) else value


def shown_steps(value: tuple[str, ...] | None) -> str | list[str] | None:
    """As a recipe writes it."""
    if value is None:
        return None
    return value[0] if len(value) == 1 else list(value)


def known_method(value: tuple[str, ...]) -> tuple[str, ...]:
    """A method that there is.

    Raises:
        ValueError: it is not.
    """
    if value not in METHODS:
        known = ", ".join("+".join(method) for method in METHODS)
        raise ValueError(f"{'+'.join(value)} is no method; known are {known}")
    return value
