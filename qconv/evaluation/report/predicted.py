"""What was predicted of a mixture's divergence, beside what it is."""

from __future__ import annotations

from qconv.evaluation.build_report import BuildReport
from qconv.evaluation.record import Run
from qconv.evaluation.report.figures import number

_MEASURED = "kld.mean"


def predicted(report: BuildReport, run: Run) -> str | None:
    """The divergence that was predicted of a build, and beside it what was measured; None where nothing was."""
    expected = report.allocation.predicted_kld
    if expected is None:
        return None
    said = [f"{number(expected)} nats a token were predicted"]
    for task in run.tasks:
        metric = task.metrics.get(_MEASURED)
        if metric is not None and metric.value is not None:
            times = f", {number(metric.value / expected)} times as much" if expected > 0.0 else ""
            said.append(f"{task.name} measured {number(metric.value)}{times}")
    return "; ".join(said)
