"""Charts as inline SVG: shapes and text with class names, which the page's style colours for light and dark.

Every function returns markup that is safe to place in a page: text is escaped here, numbers are formatted here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from qconv.evaluation.report.figures import limit, number, power

WIDTH, HEIGHT = 420, 220
"""So few units that text is still legible where the whole width is a phone's."""
SPARK = (90, 26)
"""A sparkline's units."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 10, 14, 36
_MARK_ROWS = 4
"""Lines above a histogram's bars, for the names of its marks: neighbours never share one."""
_MOST = 1e300
"""Beyond it sums of values are infinite."""
_LEAST = 1e-300
"""Less than this, a millionth of it is no float any more."""
_DECADES = 3
"""Up to so many powers of ten an axis has marks between them."""
SHADES = 8
"""Steps of a heat map's colours."""


@dataclass(frozen=True, slots=True)
class Scale:
    """From values to a length, linear or by logarithm."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Where a value lies; what is beyond the ends lies on them."""
        low, high, value = (math.log10(one) if self.log else one for one in (self.low, self.high, max(value, self.low)))
        share = (min(value, high) - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round values within the ends."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.floor(math.log10(self.high) + 1e-9) + 1)
            steps = (1.0,) if len(powers) > _DECADES else (1.0, 2.0, 5.0)
            found = [step * 10.0**power for power in powers for step in steps]
            return [one for one in found if self.low * (1 - 1e-9) <= one <= self.high * (1 + 1e-9)]
        span = self.high - self.low
        if not 0.0 < span < math.inf:
            return [self.low]
        step = 10.0 ** math.floor(math.log10(span / 3.0))
        step *= next(factor for factor in (1.0, 2.0, 5.0, 10.0) if span / (step * factor) <= 5.0)
        first = math.ceil(self.low / step - 1e-9)
        return [count * step for count in range(first, math.floor(self.high / step + 1e-9) + 1)]


def histogram(values: NDArray[np.float32], marks: Sequence[tuple[str, float]], *, unit: str) -> Markup:
    """How many values lie in each of 40 steps of their logarithm, with named marks.

    Args:
        values: Not negative; what is below a millionth of the largest counts as that.
        marks: Names and places of vertical lines.
        unit: Of the values.
    """
    finite = values[np.isfinite(values)].astype(np.float64)
    if not len(finite) or float(finite.max()) <= 0.0:
        return frame([label(WIDTH / 2, HEIGHT / 2, "all values are 0", "middle")], "histogram")
    high = max(float(finite.max()), _LEAST)
    low = high * 1e-6
    across = Scale(low, high, _LEFT, WIDTH - _RIGHT, log=True)
    edges = np.geomspace(low, high, 41)
    counts, _ = np.histogram(finite.clip(low, high), edges)
    up = Scale(0.0, float(counts.max()), HEIGHT - _BOTTOM, _TOP + 13 * _MARK_ROWS)
    parts = _axes(across, up, unit, "tokens")
    for count, start, stop in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            left, right, top = across(start), across(stop), up(float(count))
            parts.append(_rect(left + 0.5, top, right - left - 1, HEIGHT - _BOTTOM - top, "bar"))
    for index, (name, place) in enumerate(sorted(marks, key=lambda mark: mark[1])):
        x = across(place)
        parts.append(stroke("mark", x, _TOP, x, HEIGHT - _BOTTOM))
        parts.append(label(x - 3, _TOP + 10 + 13 * (index % _MARK_ROWS), name, "end"))
    return frame(parts, f"histogram over {len(values):,} tokens")


@dataclass(frozen=True, slots=True)
class TrendPoint:
    """One run in a trend."""

    label: str
    value: float | None
    low: float | None
    high: float | None
    bad: bool


def trend(points: Sequence[TrendPoint], bound: float | None, *, unit: str) -> Markup:
    """A metric from run to run, each with its interval, and its limit."""
    known = [one for point in points for one in (point.value, point.low, point.high) if one is not None]
    known = [one for one in [*known, *([] if bound is None else [bound])] if abs(one) < _MOST]
    if not known:
        return frame([label(WIDTH / 2, HEIGHT / 2, "nothing measured", "middle")], "trend")
    margin = 0.08 * (max(known) - min(known)) or abs(max(known)) * 0.1 or 1.0
    low = min(known) - margin
    up = Scale(low if min(known) < 0.0 else max(low, 0.0), max(known) + margin, HEIGHT - _BOTTOM, _TOP)
    across = Scale(0.0, max(len(points) - 1, 1), _LEFT + 14, WIDTH - _RIGHT - 14)
    parts = _axes(None, up, "", unit)
    if bound is not None:
        parts.append(
            f'<line class="limit" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{up(bound):.1f}" y2="{up(bound):.1f}"/>'
        )
        parts.append(label(WIDTH - _RIGHT, up(bound) - 4, "limit", "end"))
    places = [(across(index), point) for index, point in enumerate(points)]
    line = " ".join(f"{x:.1f},{up(point.value):.1f}" for x, point in places if point.value is not None)
    parts.append(f'<polyline class="line" points="{line}"/>')
    for x, point in places:
        if point.value is None:
            continue
        if point.low is not None and point.high is not None:
            parts.append(
                f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{up(point.low):.1f}" y2="{up(point.high):.1f}"/>'
            )
        told = escape(f"{point.label}: {number(point.value)} {unit}".strip())
        style = "dot bad" if point.bad else "dot"
        parts.append(
            f'<circle class="{style}" cx="{x:.1f}" cy="{up(point.value):.1f}" r="4"><title>{told}</title></circle>'
        )
    ends = {0: "start", len(points) - 1: "end"} if len(points) > 1 else {0: "middle"}
    for index, anchor in ends.items():
        parts.append(label(places[index][0], HEIGHT - 12, points[index].label, anchor))
    return frame(parts, f"trend over {len(points)} runs")


def heat_map(cells: NDArray[np.float64], *, rows: str, columns: str, log: bool = False) -> Markup:
    """A map of layers (down) and experts (across); NaN cells stay empty.

    Args:
        cells: [layers, experts].
        rows: What a row is.
        columns: What a column is.
        log: Shade by the logarithm of 1 + value.
    """
    count, width = cells.shape
    size = min(18.0, (WIDTH - _LEFT - _RIGHT) / max(width, 1))
    tall = min(18.0, max(size, 6.0))
    shade = np.log1p(cells.clip(min=0.0)) if log else cells
    known = shade[np.isfinite(shade)]
    if not len(known):
        return frame([label(WIDTH / 2, HEIGHT / 2, "nothing measured", "middle")], "heat map")
    low, span = float(known.min()), float(known.max() - known.min()) or 1.0
    paths: list[list[str]] = [[] for _ in range(SHADES)]
    for row, column in zip(*np.nonzero(np.isfinite(shade)), strict=True):
        step = min(int((shade[row, column] - low) / span * SHADES), SHADES - 1)
        x, y = _LEFT + column * size, _TOP + 14 + row * tall
        paths[step].append(f"M{x:.1f} {y:.1f}h{size - 0.4:.1f}v{tall - 0.4:.1f}h-{size - 0.4:.1f}z")
    parts = [f'<path class="shade{step}" d="{"".join(path)}"/>' for step, path in enumerate(paths) if path]
    bottom = _TOP + 14 + count * tall
    parts.append(label(_LEFT, _TOP + 8, f"{columns} 0 to {width - 1}", "start"))
    for row in {0, count - 1}:
        parts.append(label(_LEFT - 6, _TOP + 14 + (row + 0.5) * tall + 4, f"{rows} {row}", "end"))
    ends = (float(np.nanmin(cells[np.isfinite(cells)])), float(np.nanmax(cells[np.isfinite(cells)])))
    for step in range(SHADES):
        parts.append(_rect(_LEFT + 60 + step * 14, bottom + 10, 14, 10, f"shade{step}"))
    parts.append(label(_LEFT + 54, bottom + 19, limit(ends[0]), "end"))
    parts.append(label(_LEFT + 66 + SHADES * 14, bottom + 19, limit(ends[1]), "start"))
    return frame(parts, f"{count} by {width} map", height=bottom + 28)


def sparkline(points: Sequence[TrendPoint], said: str) -> Markup:
    """A trend in a word's place: a line, its last point a dot, red where that run is bad.

    Args:
        points: From the oldest to the newest.
        said: What it shows, read aloud and on hovering.
    """
    known = [(index, point) for index, point in enumerate(points) if point.value is not None]
    known = [(index, point) for index, point in known if abs(point.value or 0.0) < _MOST]
    values = [point.value or 0.0 for _, point in known]
    if not known:
        return Markup("")
    across = Scale(0.0, max(len(points) - 1, 1), 4.0, SPARK[0] - 6.0)
    up = Scale(min(values), max(values), SPARK[1] - 5.0, 5.0)
    places = [f"{across(index):.1f},{up(value):.1f}" for (index, _), value in zip(known, values, strict=True)]
    x, _, y = places[-1].partition(",")
    style = "dot bad" if known[-1][1].bad else "dot"
    told = escape(said)
    return Markup(
        f'<svg class="spark" viewBox="0 0 {SPARK[0]} {SPARK[1]}" role="img" aria-label="{told}"><title>{told}</title>'
        f'<polyline class="line" points="{" ".join(places)}"/><circle class="{style}" cx="{x}" cy="{y}" r="3"/></svg>'
    )


def axis(tick: float) -> str:
    """A value beside an axis."""
    size = abs(tick)
    if 0.0 < size < 1e-4 or size >= 1e6:
        exponent = math.floor(math.log10(size) + 1e-9)
        factor = tick / 10.0**exponent if exponent > -300 else math.copysign(1.0, tick)
        return power(exponent) if round(factor, 6) == 1.0 else f"{factor:.2g}·{power(exponent)}"
    return f"{tick:,.10g}"


def _axes(across: Scale | None, up: Scale, unit: str, quantity: str) -> list[str]:
    parts = [stroke("axis", _LEFT, HEIGHT - _BOTTOM, WIDTH - _RIGHT, HEIGHT - _BOTTOM)]
    for tick in up.ticks():
        y = up(tick)
        parts.append(stroke("grid", _LEFT, y, WIDTH - _RIGHT, y))
        parts.append(label(_LEFT - 6, y + 4, axis(tick), "end"))
    parts.append(label(8, _TOP + 2, quantity, "start"))
    if across is not None:
        for tick in across.ticks():
            parts.append(label(across(tick), HEIGHT - 18, axis(tick), "middle"))
        parts.append(label(WIDTH - _RIGHT, HEIGHT - 4, unit, "end"))
    return parts


def _rect(x: float, y: float, width: float, height: float, name: str) -> str:
    return f'<rect class="{name}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{max(height, 0):.1f}"/>'


def stroke(name: str, x: float, y: float, to_x: float, to_y: float) -> str:
    """A straight line of a class."""
    return f'<line class="{name}" x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"/>'


def label(x: float, y: float, text: str, anchor: str, name: str = "") -> str:
    """Text, escaped, from, to or around a place."""
    style = f' class="{name}"' if name else ""
    return f'<text{style} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def frame(parts: Sequence[str], said: str, height: float = HEIGHT) -> Markup:
    """A chart of its parts; ``said`` is read aloud."""
    body = "".join(parts)
    return Markup(f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(said)}">{body}</svg>')
