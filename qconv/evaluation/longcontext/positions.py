"""Divergence and perplexity by position: classes that double in length, and over the windows intervals of each.

The window is the unit of resampling. Build and reference read the same tokens, so every number is paired; the *shift*
is the mean divergence in the last class less that in the first, of each window by itself. A rotary embedding with
another scaling than the reference's moves it, rounded weights hardly do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from qconv.evaluation.divergence import Floats32
from qconv.evaluation.metrics import Scores
from qconv.evaluation.record import Metric
from qconv.evaluation.statistics import Floats, Interval, finite, ratio_interval
from qconv.evaluation.windows import WindowedText

FIRST = 256
"""Positions of the first class; each further one ends at twice as many."""
SHIFT = "kld.shift"


@dataclass(frozen=True, slots=True)
class Bucket:
    """A class of positions, from (inclusive) and to (exclusive), with what was found there, each with its interval."""

    start: int
    stop: int
    ppl: Interval
    ratio: Interval | None
    kld: Interval | None

    @property
    def name(self) -> str:
        """Its last position, short: ``512``, ``4K``."""
        return f"{self.stop // 1024}K" if self.stop >= 1024 and self.stop % 1024 == 0 else str(self.stop)


def edges(context: int) -> list[int]:
    """Ends of the classes of a window: 0, 256, 512 ... and the window's own length."""
    found = [0]
    stop = FIRST
    while stop < context:
        found.append(stop)
        stop *= 2
    return [*found, context]


def buckets(text: WindowedText, scores: Scores) -> list[Bucket]:
    """All classes of positions that hold a scored token."""
    window = np.repeat(np.arange(len(text.windows)), [one.scored for one in text.windows])
    position = np.concatenate([np.arange(one.first, len(one.ids)) for one in text.windows])
    found = []
    ends = edges(max(len(one.ids) for one in text.windows))
    for start, stop in pairwise(ends):
        inside = np.flatnonzero((position >= start) & (position < stop))
        if not len(inside):
            continue
        sums = _Sums(inside, window[inside], len(text.windows))
        tokens, nll, beside = sums.of(np.ones(len(position), dtype=np.float32)), sums.of(scores.nll), scores.beside
        ratio = kld = None
        if beside is not None:
            ratio = _interval(nll - sums.of(beside.reference_nll), tokens, np.exp)
            kld = _interval(sums.of(beside.kl), tokens)
        found.append(Bucket(start, stop, _interval(nll, tokens, np.exp), ratio, kld))
    return found


@dataclass(frozen=True, slots=True)
class _Sums:
    """Over each window that has any of some tokens: their indices among all, the window of each, how many windows."""

    inside: NDArray[np.int64]
    units: NDArray[np.int64]
    windows: int

    def of(self, values: Floats32) -> Floats:
        """float64 [windows with tokens]."""
        held = np.bincount(self.units, minlength=self.windows) > 0
        sums = np.bincount(self.units, values[self.inside].astype(np.float64), self.windows)
        return np.asarray(sums[held], dtype=np.float64)


def shift(text: WindowedText, scores: Scores) -> Interval | None:
    """The mean divergence in the last class less that in the first, over windows; None without a reference."""
    if scores.beside is None:
        return None
    ends = edges(max(len(one.ids) for one in text.windows))
    differences, offset = [], 0
    for one in text.windows:
        kl = scores.beside.kl[offset : offset + one.scored].astype(np.float64)
        offset += one.scored
        early, late = kl[: ends[1] - one.first], kl[ends[-2] - one.first :]
        if len(late):
            differences.append(float(late.mean() - early.mean()))
    y = np.array(differences)
    return _interval(y, np.ones(len(y)))


def metrics(found: list[Bucket], moved: Interval | None, note: str | None, windows: int) -> dict[str, Metric]:
    """Divergence and perplexity ratio of each class, and the shift."""
    named: dict[str, Metric] = {}
    for one in found:
        if one.kld is not None and one.ratio is not None:
            named[f"kld.to_{one.name}"] = _metric(one.kld, "nats", windows)
            named[f"ppl.ratio.to_{one.name}"] = _metric(one.ratio, "", windows)
        else:
            named[f"ppl.to_{one.name}"] = _metric(one.ppl, "", windows)
    if moved is not None:
        named[SHIFT] = _metric(moved, "nats", windows).model_copy(update={"note": note})
    return named


def details(found: list[Bucket]) -> dict[str, JsonValue]:
    """What a report says and draws of the classes."""
    words: dict[str, JsonValue] = {
        SHIFT: {
            "name": "KL divergence, shift by position",
            "meaning": "At the end of the context less at its beginning. A lost or added rope scaling moves it.",
            "unit": "nats a token",
        }
    }
    for one in found:
        span = f"positions {one.start:,} to {one.stop - 1:,}"
        words[f"kld.to_{one.name}"] = {"name": f"KL divergence, {span}", "unit": "nats a token"}
        words[f"ppl.ratio.to_{one.name}"] = {"name": f"Perplexity over the reference's, {span}"}
        words[f"ppl.to_{one.name}"] = {"name": f"Perplexity, {span}"}
    rows: list[JsonValue] = [
        [
            f"{one.start:,} to {one.stop - 1:,}",
            *_cells(one.kld),
            *_cells(one.ratio),
            one.ppl.value,
        ]
        for one in found
    ]
    columns: list[JsonValue] = [
        "positions",
        "KL divergence",
        "from",
        "to",
        "perplexity over the reference's",
        "from",
        "to",
        "perplexity",
    ]
    drawn = [(one.name, one.kld if one.kld is not None else one.ppl) for one in found]
    points: list[JsonValue] = [
        {"label": f"to {name}", "value": finite(one.value), "low": finite(one.low), "high": finite(one.high)}
        for name, one in drawn
    ]
    beside = found[0].kld is not None
    return {
        "words": words,
        "tables": [
            {"title": "By position in the context", "columns": columns, "rows": rows, "note": "95 % intervals."}
        ],
        "curves": [
            {
                "title": "KL divergence by position" if beside else "Perplexity by position",
                "unit": "nats a token" if beside else "",
                "points": points,
                "note": "Classes of positions, each up to twice as far as the one before.",
            }
        ],
    }


def _interval(y: Floats, x: Floats, transform: Callable[[Floats], Floats] = lambda one: one) -> Interval:
    if not np.all(np.isfinite(y)):
        return Interval(math.inf, -math.inf, math.inf)
    with np.errstate(over="ignore"):
        return ratio_interval(y, x, transform=transform)


def _metric(found: Interval, unit: str, windows: int) -> Metric:
    low, high = finite(found.low), finite(found.high)
    return Metric(value=finite(found.value), low=low, high=high, unit=unit, better="lower", units=windows)


def _cells(found: Interval | None) -> list[JsonValue]:
    return [None] * 3 if found is None else [finite(one) for one in (found.value, found.low, found.high)]
