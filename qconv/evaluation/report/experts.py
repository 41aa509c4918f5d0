"""Layer by expert: what a build's own report says of every expert's error and tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qconv.evaluation.build_report import BuildReport
from qconv.evaluation.report.shaded import relative_error

_EXPERT = re.compile(r"\.experts\.(\d{1,9})(?:\.|$)")
_SPARSEST = 1000
"""Cells of a map for each module that is known; a report names almost every expert of almost every layer."""
_MOST = 2**62


@dataclass(frozen=True, slots=True)
class ExpertMaps:
    """Of every expert, float64 [layers, experts]; NaN where nothing is known of one.

    Attributes:
        error: Squared error of its weights over their squares, in percent; the worst of its linears. None where a
            report tells no expert's own, as of GGUF, where a layer's experts are one tensor.
        tokens: Calibration tokens that the router sent it; None where nothing was calibrated.
    """

    error: NDArray[np.float64] | None
    tokens: NDArray[np.float64] | None


def expert_maps(report: BuildReport) -> ExpertMaps | None:
    """The maps of a build's report; None for one without experts, or that names a few which lie far apart."""
    errors = [
        (row, int(found[1]), relative_error(snr))
        for row, layer in enumerate(report.layers)
        for name, snr in layer.snr_db.items()
        if snr is not None and (found := _EXPERT.search(name))
    ]
    tokens = [
        (row, int(found[1]), float(min(record.tokens, _MOST)))
        for row, layer in enumerate(report.layers)
        for record in layer.experts
        if (found := _EXPERT.search(record.module))
    ]
    width = 1 + max((expert for _, expert, _ in (*errors, *tokens)), default=-1)
    if len(report.layers) * width > _SPARSEST * (len(errors) + len(tokens)):
        return None
    maps = [_map(cells, len(report.layers), width) for cells in (errors, tokens)]
    return None if maps[0] is None and maps[1] is None else ExpertMaps(*maps)


def _map(cells: list[tuple[int, int, float]], layers: int, width: int) -> NDArray[np.float64] | None:
    """The largest value of each cell; None without any."""
    if not cells:
        return None
    made = np.full((layers, width), np.nan)
    for row, expert, value in cells:
        made[row, expert] = np.fmax(made[row, expert], value)
    return made
