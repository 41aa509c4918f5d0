"""Layer by expert: what a build's own report says of every expert's error and tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_EXPERT = re.compile(r"\.experts\.(\d+)(?:\.|$)")
_WORST = 10


@dataclass(frozen=True, slots=True)
class ExpertMaps:
    """Of every expert, float64 [layers, experts]; NaN where nothing is known.

    Attributes:
        error: Squared error of its weights over their squares, in percent; the worst of its linears.
        tokens: Calibration tokens that the router sent it; None where nothing was calibrated.
        worst: The modules of the largest error: name and percent.
    """

    error: NDArray[np.float64]
    tokens: NDArray[np.float64] | None
    worst: tuple[tuple[str, float], ...]


def expert_maps(report: Mapping[str, Any]) -> ExpertMaps | None:
    """The maps of a ``qconv-report.json``; None for a build without experts, or whose report does not tell."""
    layers: Sequence[Mapping[str, Any]] = report.get("layers") or []
    errors = {
        (row, name): 100.0 * 10.0 ** (-snr / 10.0)
        for row, layer in enumerate(layers)
        for name, snr in (layer.get("snr_db") or {}).items()
        if snr is not None
    }
    placed = [(row, int(found[1]), error) for (row, name), error in errors.items() if (found := _EXPERT.search(name))]
    if not placed:
        return None
    width = 1 + max(expert for _, expert, _ in placed)
    error = np.full((len(layers), width), np.nan)
    for row, expert, one in placed:
        error[row, expert] = np.fmax(error[row, expert], one)
    tokens = np.full_like(error, np.nan)
    for row, layer in enumerate(layers):
        for record in layer.get("experts") or []:
            found = _EXPERT.search(record["module"])
            if found and int(found[1]) < width:
                tokens[row, int(found[1])] = record["tokens"]
    worst = sorted(((name, one) for (_, name), one in errors.items()), key=lambda pair: -pair[1])[:_WORST]
    return ExpertMaps(error, None if np.isnan(tokens).all() else tokens, tuple(worst))
