"""Tables by layer and role whose cells are shaded by their values: bits per weight, and where the error sits."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qconv.artifacts.bits import role_of
from qconv.evaluation.build_report import BuildReport
from qconv.evaluation.report.charts import SHADES
from qconv.evaluation.report.figures import number

_PLACED = re.compile(r"(?:^|\.)(?:layers|blk)\.(\d{1,9})\.(.+)")
_LOUDEST = 300.0
"""Power of ten of a relative error, short of what a float holds."""
_OUTSIDE = "outside the layers"


@dataclass(frozen=True, slots=True)
class ShadedTable:
    """Layers down, roles across.

    Attributes:
        roles: Columns.
        rows: A layer, and for each role its value as text and its shade of ``SHADES``; None where it has no such role.
    """

    roles: tuple[str, ...]
    rows: tuple[tuple[str, tuple[tuple[str, int] | None, ...]], ...]


def shaded(rows: Sequence[tuple[str, Mapping[str, float]]], told: Callable[[float], str]) -> ShadedTable | None:
    """A table of values by layer and role; None for one without any."""
    figures = [value for _, roles in rows for value in roles.values()]
    if not figures:
        return None
    roles = tuple(dict.fromkeys(role for _, roles in rows for role in roles))
    low, span = min(figures), max(figures) - min(figures)

    def cell(value: float | None) -> tuple[str, int] | None:
        if value is None:
            return None
        return told(value), min(int((value - low) / span * SHADES), SHADES - 1) if span > 0.0 else 0

    return ShadedTable(roles, tuple((layer, tuple(cell(values.get(role)) for role in roles)) for layer, values in rows))


def bits_table(report: BuildReport) -> ShadedTable | None:
    """Bits per weight, of a build's report; None for one that is no mixture."""
    return shaded([(str(layer.layer), layer.roles) for layer in report.bits_by_layer], lambda bits: f"{bits:.2f}")


def error_table(report: BuildReport) -> ShadedTable | None:
    """Errors by layer and role, in percent; None for a report that tells none."""
    rows = [(_OUTSIDE if layer < 0 else str(layer), roles) for layer, roles in errors_of(report).items()]
    return shaded(rows, number)


def errors_of(report: BuildReport) -> dict[int, dict[str, float]]:
    """Squared error over squared weights in percent, the mean over the modules of a layer that have one role.

    By layer and role, what lies outside of layers last, as layer -1. Modules that are exact are not told of.
    """
    found: dict[int, dict[str, list[float]]] = {}
    for name, snr in noise_of(report).items():
        placed = _PLACED.search(name)
        layer, within = (int(placed[1]), placed[2]) if placed else (-1, name)
        role = short_role(role_of(within.removesuffix(".weight")))
        found.setdefault(layer, {}).setdefault(role, []).append(relative_error(snr))
    return {
        layer: {role: sum(each) / len(each) for role, each in found[layer].items()}
        for layer in sorted(found, key=lambda layer: (layer < 0, layer))
    }


def short_role(role: str) -> str:
    """A role without the block that it cannot be mistaken for another's."""
    return role.removeprefix("self_attn.").removeprefix("mlp.")


def noise_of(report: BuildReport) -> dict[str, float]:
    """Signal to noise of every module or tensor that was rounded, in decibels, by name."""
    told = {name: snr for layer in report.layers for name, snr in layer.snr_db.items()}
    told |= {name: one.snr_db for name, one in report.tensors.items()}
    return {name: snr for name, snr in told.items() if snr is not None and math.isfinite(snr)}


def relative_error(snr_db: float) -> float:
    """Squared error over squared weights, in percent."""
    return 100.0 * math.pow(10.0, min(-snr_db / 10.0, _LOUDEST))
