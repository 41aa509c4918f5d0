"""Bits per weight by layer and role, as a table whose cells are shaded; what was predicted of it beside what it is."""

from __future__ import annotations

from dataclasses import dataclass

from qconv.evaluation.build_report import BuildReport
from qconv.evaluation.record import Run
from qconv.evaluation.report.charts import SHADES

_MEASURED = "kld.mean"


@dataclass(frozen=True, slots=True)
class BitsTable:
    """A mixture's bits.

    Attributes:
        roles: Columns.
        rows: A layer, and for each role its bits as text and its shade of ``SHADES``; None where it has no such role.
    """

    roles: tuple[str, ...]
    rows: tuple[tuple[str, tuple[tuple[str, int] | None, ...]], ...]


def bits_table(report: BuildReport) -> BitsTable | None:
    """Of a build's report; None for one that is no mixture."""
    layers = report.bits_by_layer
    figures = [bits for layer in layers for bits in layer.roles.values()]
    if not figures:
        return None
    roles = tuple(dict.fromkeys(role for layer in layers for role in layer.roles))
    low, span = min(figures), max(figures) - min(figures)

    def cell(bits: float | None) -> tuple[str, int] | None:
        if bits is None:
            return None
        return f"{bits:.2f}", min(int((bits - low) / span * SHADES), SHADES - 1) if span > 0.0 else 0

    rows = tuple((str(layer.layer), tuple(cell(layer.roles.get(role)) for role in roles)) for layer in layers)
    return BitsTable(roles, rows)


def predicted(report: BuildReport, run: Run) -> str | None:
    """The divergence that was predicted of a build, and beside it what was measured; None where nothing was."""
    expected = report.allocation.predicted_kld
    if expected is None:
        return None
    said = [f"{expected:.3g} nats were predicted"]
    for task in run.tasks:
        metric = task.metrics.get(_MEASURED)
        if metric is not None and metric.value is not None:
            times = f", {metric.value / expected:.2g} times as much" if expected > 0.0 else ""
            said.append(f"{task.name} measured {metric.value:.3g}{times}")
    return "; ".join(said)
