"""Layer by expert: what a build's own report says of every expert's error and tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qconv.evaluation.build_report import BuildReport

_EXPERT = re.compile(r"\.experts\.(\d{1,9})(?:\.|$)")
_WORST = 10
_SPARSEST = 1000
"""Cells of a map for each module that is known; a report names almost every expert of almost every layer."""
_LOUDEST = 300.0
"""Power of ten of a relative error, short of what a float holds."""
_MOST = 2**62


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


def expert_maps(report: BuildReport) -> ExpertMaps | None:
    """The maps of a build's report; None for one without experts, or that names a few which lie far apart."""
    layers = report.layers
    errors = {
        (row, name): 100.0 * 10.0 ** min(-snr / 10.0, _LOUDEST)
        for row, layer in enumerate(layers)
        for name, snr in layer.snr_db.items()
        if snr is not None
    }
    placed = [(row, int(found[1]), error) for (row, name), error in errors.items() if (found := _EXPERT.search(name))]
    if not placed:
        return None
    width = 1 + max(expert for _, expert, _ in placed)
    if len(layers) * width > _SPARSEST * len(placed):
        return None
    error = np.full((len(layers), width), np.nan)
    for row, expert, one in placed:
        error[row, expert] = np.fmax(error[row, expert], one)
    tokens = np.full_like(error, np.nan)
    for row, layer in enumerate(layers):
        for record in layer.experts:
            found = _EXPERT.search(record.module)
            if found and int(found[1]) < width:
                tokens[row, int(found[1])] = min(record.tokens, _MOST)
    worst = sorted(((name, one) for (_, name), one in errors.items()), key=lambda pair: -pair[1])[:_WORST]
    return ExpertMaps(error, None if np.isnan(tokens).all() else tokens, tuple(worst))
