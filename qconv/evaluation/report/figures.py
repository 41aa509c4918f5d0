"""Numbers for people: as many digits as say something, the same ones for a value and its interval, no exponents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

NOTHING = "-"
"""Where there is no number."""
Form: TypeAlias = Literal["plain", "share", "factor"]
"""How a number is told: as it is; a share of 1 in percent; a factor as how many percent more or less than 1 it is."""

_DIGITS = 3
_DECIMALS = 6
"""More are no number that one reads: below, powers of ten."""
_LARGE = 1e15
_TINY = 1e-12
"""Less than this is what arithmetic leaves of 0."""
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float | None, form: Form = "plain") -> str:
    """Three significant digits, whole numbers in full; a dash for none."""
    if value is None:
        return NOTHING
    shown = scaled(value, form)
    return _told(shown, _decimals(shown), form)


def limit(value: float | None, form: Form = "plain") -> str:
    """A number that somebody chose: as :func:`number`, without zeros that say nothing."""
    told = number(value, form)
    figure, space, unit = told.partition(" ")
    return (figure.rstrip("0").rstrip(".") if "." in figure else figure) + space + unit


def interval(low: float | None, high: float | None, value: float | None, form: Form = "plain") -> tuple[str, str]:
    """A value and its interval, ``"low to high"``, to the same decimals; no interval where an end is unknown.

    The decimals show three digits of the value, but no fewer than two of the interval's width and no more than three.
    """
    if value is None or low is None or high is None:
        return number(value, form), NOTHING
    shown, least, most = (scaled(one, form) for one in (value, low, high))
    width = most - least
    decimals = _decimals(shown)
    if 0.0 < width < math.inf and decimals is not None:
        least_decimals = 1 - math.floor(math.log10(width))
        decimals = min(max(decimals, least_decimals), least_decimals + 1)
        decimals = min(max(decimals, 0), _DECIMALS)
    return _told(shown, decimals, form), f"{_told(least, decimals, form)} to {_told(most, decimals, form)}"


def nbytes(count: float) -> str:
    """A size in decimal units, as disks and the Hub count."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{number(count / size)} {unit}"
    return f"{count:,.0f} bytes"


def plain_list(names: Sequence[str]) -> str:
    """Names in a sentence."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def power(exponent: int) -> str:
    """Ten to a power."""
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def scaled(value: float, form: Form) -> float:
    """The number that is shown of a value."""
    return value if form == "plain" else 100.0 * (value if form == "share" else value - 1.0)


def _decimals(value: float) -> int | None:
    """Decimals for three significant digits; None where a power of ten says it better."""
    size = abs(value)
    if size == 0.0 or not math.isfinite(size):
        return 0
    needed = _DIGITS - 1 - math.floor(math.log10(size))
    return None if needed > _DECIMALS + 2 or size >= _LARGE else min(max(needed, 0), _DECIMALS)


def _told(value: float, decimals: int | None, form: Form) -> str:
    if not math.isfinite(value):
        return "not finite"
    if decimals is None and abs(value) < _TINY:
        told = f"below {power(-12)}"
    elif decimals is None:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        told = f"{mantissa}·{power(int(exponent))}"
    else:
        told = f"{value:,.{decimals}f}"
    if not told.strip("-0.,"):
        told = "0"
    if form == "factor" and told[0].isdigit() and told != "0":
        told = f"+{told}"
    return f"{told} %" if form != "plain" else told
