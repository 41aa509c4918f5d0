"""Types of the options that are numbers: each with a range, and none of them NaN, infinite or beyond 64 bits."""

from __future__ import annotations

import math
from typing import Any

import click

COUNT = click.IntRange(1, 2**31 - 1)
"""How many of something: tokens, layers, rows."""
THREADS = click.IntRange(1, 4096)
SEED = click.IntRange(0, 2**63 - 1)
"""What every random generator takes."""
IDENTIFIER = click.IntRange(1, 2**63 - 1)
"""A row of a database."""


class FiniteRange(click.FloatRange):
    """A range of floats, all of them numbers: click's own lets NaN through any bound."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number.

        Raises:
            click.BadParameter: it is none, or out of range.
        """
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class Temperature(FiniteRange):
    """A temperature: 0, which is greedy, or one by which logits can be divided in float32."""

    LEAST = 1e-3
    MOST = 100.0

    def __init__(self) -> None:
        super().__init__(min=0.0, max=self.MOST)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The temperature.

        Raises:
            click.BadParameter: it is none.
        """
        number = super().convert(value, param, ctx)
        if 0.0 < number < self.LEAST:
            self.fail(f"{value} is neither 0 (greedy) nor from {self.LEAST} to {self.MOST:g}.", param, ctx)
        return number
