"""The chart that says which build to take: KL divergence against size, one mark a build, with intervals.

A mark's shape says the verdict, its colour says it again; what another tool made is grey. Divergence is told by its
logarithm where it spans more than one power of ten; what is exactly 0 then lies on the lower edge.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from qconv.evaluation.report.charts import WIDTH, Scale, axis, frame, label, stroke
from qconv.evaluation.report.figures import nbytes, number

HEIGHT = 280
LONGEST = 18
"""Characters of a name beside its mark; the table below the chart has it whole."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 24, 40
_LETTER, _LINE = 7.4, 13.0
"""Units that a letter and a line of text take at most, in any of the fonts that a browser may choose."""
_MARK = 6.0
_MOST, _LEAST = 1e9, 1e-12
"""Divergences beyond are drawn there: no model is so bad, no arithmetic so exact."""
_NEAR = 10.0
"""A limit so many times the largest divergence is drawn, one farther away is told in the table alone."""


@dataclass(frozen=True, slots=True)
class Build:
    """A build in the chart.

    Attributes:
        name: Its name.
        size: Bytes of its weights' files.
        kld: Mean KL divergence from the reference, nats a token; not negative.
        low: Lower end of its interval, None for no interval.
        high: Upper end.
        outcome: Its verdict, in the words of :data:`~qconv.evaluation.record.Outcome`.
        limit: What its gate allows it, None for no gate.
        other: Whether another tool made it.
    """

    name: str
    size: float
    kld: float
    low: float | None
    high: float | None
    outcome: str
    limit: float | None = None
    other: bool = False


@dataclass(frozen=True, slots=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: _Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


def kld_by_size(builds: Sequence[Build]) -> Markup:
    """The chart of at least one build."""
    bytes_ = [build.size for build in builds]
    span = max(bytes_) - min(bytes_)
    margin = 0.09 * span or 0.1 * max(bytes_) or 1.0
    across = Scale(max(min(bytes_) - margin, 0.0), max(bytes_) + margin, _LEFT, WIDTH - _RIGHT)
    up, zero = _upward(builds)
    unit, divisor = _unit(max(bytes_))
    parts = [stroke("axis", _LEFT, HEIGHT - _BOTTOM, WIDTH - _RIGHT, HEIGHT - _BOTTOM)]
    for tick in up.ticks():
        parts.append(stroke("grid", _LEFT, up(tick), WIDTH - _RIGHT, up(tick)))
        parts.append(label(_LEFT - 6, up(tick) + 4, axis(tick), "end"))
    if zero:
        parts.append(label(_LEFT - 6, HEIGHT - _BOTTOM + 1, "0", "end"))
    for tick in Scale(across.low / divisor, across.high / divisor, 0.0, 1.0).ticks():
        parts.append(label(across(tick * divisor), HEIGHT - _BOTTOM + 16, axis(tick), "middle"))
    parts.append(label(4, 11, "KL divergence, nats a token", "start"))
    parts.append(label(WIDTH - _RIGHT, HEIGHT - 5, f"size of the files, {unit}", "end"))

    places = [
        (across(build.size), HEIGHT - _BOTTOM if zero and build.kld <= 0.0 else up(build.kld)) for build in builds
    ]
    taken = [_Box(x - _MARK, y - _MARK, x + _MARK, y + _MARK) for x, y in places]
    for build, (x, y) in zip(builds, places, strict=True):
        parts.append(_mark(build, x, y, up))
    for build, (x, y) in zip(builds, places, strict=True):
        shown = shortened(build.name)
        width = _LETTER * sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in shown)
        place = _free(x, y, width, taken)
        if place is not None:
            taken.append(place)
            parts.append(label(place.left, place.bottom - 3, shown, "start", "name"))
    return frame(parts, f"KL divergence against size of {len(builds)} builds", HEIGHT)


def shortened(name: str) -> str:
    """A name as it fits beside a mark."""
    name = " ".join(name.split())
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _upward(builds: Sequence[Build]) -> tuple[Scale, bool]:
    """From divergences to heights, and whether there is a place for 0 below all others."""
    found = [one for build in builds for one in (build.kld, build.low, build.high) if one is not None]
    found = [min(one, _MOST) for one in found if math.isfinite(one) and one > _LEAST]
    zero = any(build.kld <= _LEAST for build in builds)
    if not found:
        return Scale(0.0, 1e-3, HEIGHT - _BOTTOM, _TOP), False
    largest = max(found)
    limits = [build.limit for build in builds if build.limit is not None and 0.0 < build.limit <= _NEAR * largest]
    least, most = min(found), max(largest, *limits) if limits else largest
    bottom = HEIGHT - _BOTTOM - (26 if zero else 0)
    if most > 10.0 * least:
        return Scale(least / 1.4, most * 1.4, bottom, _TOP, log=True), zero
    return Scale(0.0, most * 1.12, HEIGHT - _BOTTOM, _TOP), False


def _mark(build: Build, x: float, y: float, up: Scale) -> str:
    """Whisker, limit and mark; what it says on hovering is written into it."""
    parts = []
    if build.low is not None and build.high is not None and build.high > build.low:
        parts.append(stroke("whisker", x, up(build.low), x, up(build.high)))
    if build.limit is not None and up.low <= build.limit <= up.high:
        parts.append(stroke("limit", x - 12, up(build.limit), x + 12, up(build.limit)))
    style = _STYLES.get(build.outcome, "open")
    colour = "other" if build.other else style
    parts.append(f'<path class="point {colour}" d="{_shape(style, x, y)}"/>')
    told = escape(f"{build.name}: {number(build.kld)} nats a token, {nbytes(build.size)}, {build.outcome}")
    return f"<g><title>{told}</title>{''.join(parts)}</g>"


_STYLES = {"pass": "pass", "regression": "fail", "corrupt": "fail", "inconclusive": "unsure"}


def _shape(style: str, x: float, y: float) -> str:
    """A disc that passes, a triangle that fails, a diamond that cannot tell, a square that nothing judged."""
    size = _MARK
    if style == "pass":
        return f"M{x - size:.1f} {y:.1f}a{size} {size} 0 1 0 {2 * size} 0a{size} {size} 0 1 0 {-2 * size} 0z"
    if style == "fail":
        return f"M{x:.1f} {y + size:.1f}l{-size} {-1.9 * size:.1f}h{2 * size}z"
    if style == "unsure":
        return f"M{x:.1f} {y - size:.1f}l{size} {size}l{-size} {size}l{-size} {-size}z"
    return f"M{x - size * 0.8:.1f} {y - size * 0.8:.1f}h{1.6 * size:.1f}v{1.6 * size:.1f}h{-1.6 * size:.1f}z"


def _free(x: float, y: float, width: float, taken: Sequence[_Box]) -> _Box | None:
    """Where a name has room beside its mark; None where it has none."""
    gap = _MARK + 3.0
    rows = (0.0, -_LINE, _LINE, -1.6 * _LINE, 1.6 * _LINE)
    tried = [(x + gap, y + row) for row in rows] + [(x - gap - width, y + row) for row in rows]
    tried += [(x - width / 2, y + row) for row in (-1.4 * _LINE, 1.4 * _LINE, -2.4 * _LINE, 2.4 * _LINE)]
    for left, middle in tried:
        box = _Box(left, middle - _LINE / 2 - 1, left + width, middle + _LINE / 2 + 1)
        inside = box.left >= _LEFT + 2 and box.right <= WIDTH - 2 and box.top >= _TOP and box.bottom <= HEIGHT - _BOTTOM
        if inside and not any(box.meets(other) for other in taken):
            return box
    return None


def _unit(most: float) -> tuple[str, float]:
    return next(((unit, size) for unit, size in (("GB", 1e9), ("MB", 1e6)) if most >= size), ("kB", 1e3))
