"""Where a build's error sits, from its own report: by layer and role, by layer and expert, and the worst modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from qconv.evaluation.build_report import BuildReport
from qconv.evaluation.report.charts import heat_map
from qconv.evaluation.report.experts import expert_maps
from qconv.evaluation.report.figures import number
from qconv.evaluation.report.shaded import (
    ShadedTable,
    bits_table,
    error_table,
    errors_of,
    noise_of,
    relative_error,
)
from qconv.evaluation.report.task_view import Chart

_WORST = 10


@dataclass(frozen=True, slots=True)
class ErrorView:
    """What a build's report says.

    Attributes:
        errors: Error by layer and role, in percent.
        charts: Maps of experts.
        worst: Modules of the largest error: name and percent.
        bits: Bits per weight by layer and role; None where all have the same.
        coverage: How many calibration tokens experts saw, in sentences.
    """

    errors: ShadedTable | None
    charts: tuple[Chart, ...]
    worst: tuple[tuple[str, str], ...]
    bits: ShadedTable | None
    coverage: tuple[str, ...]


def error_view(report: BuildReport) -> ErrorView:
    """Everything that is shown of a build's report."""
    maps, charts = expert_maps(report), []
    if maps is not None and maps.error is not None:
        svg = heat_map(maps.error, rows="layer", columns="experts")
        charts.append(Chart("Error of every expert's weights", svg, "In percent: of each expert its worst linear."))
    if maps is not None and maps.tokens is not None:
        svg = heat_map(maps.tokens, rows="layer", columns="experts", log=True)
        charts.append(Chart("Calibration tokens of every expert", svg, "Shaded by their logarithm."))
    worst = sorted(((name, relative_error(snr)) for name, snr in noise_of(report).items()), key=lambda one: -one[1])
    return ErrorView(
        errors=error_table(report),
        charts=tuple(charts),
        worst=tuple((name, f"{number(error)} %") for name, error in worst[:_WORST]),
        bits=bits_table(report),
        coverage=coverage_lines(report),
    )


def mean_errors(report: BuildReport) -> tuple[dict[str, float], dict[int, float]]:
    """Squared error over squared weights in percent, by role, the largest first, and by layer.

    Of a role it is the mean over layers, of a layer the mean over roles; what lies outside of layers is left out.
    """
    errors = {layer: roles for layer, roles in errors_of(report).items() if layer >= 0}
    roles: dict[str, list[float]] = {}
    for each in errors.values():
        for role, error in each.items():
            roles.setdefault(role, []).append(error)
    by_role = {role: sum(one) / len(one) for role, one in roles.items()}
    by_layer = {layer: sum(one.values()) / len(one) for layer, one in errors.items()}
    return dict(sorted(by_role.items(), key=lambda pair: (-pair[1], pair[0]))), by_layer


def error_lines(by_role: Mapping[str, float], by_layer: Mapping[int, float]) -> tuple[str, ...]:
    """What :func:`mean_errors` found, in two lines at most."""
    if not by_role:
        return ()
    lines = ["squared, in percent: " + ", ".join(f"{role} {number(error)}" for role, error in by_role.items())]
    if len(by_layer) > 1:
        best, worst = min(by_layer, key=lambda one: by_layer[one]), max(by_layer, key=lambda one: by_layer[one])
        lines.append(f"from {number(by_layer[best])} in layer {best} to {number(by_layer[worst])} in layer {worst}")
    return tuple(lines)


def coverage_lines(report: BuildReport) -> tuple[str, ...]:
    """How many calibration tokens the experts saw, and what was left to plain rounding."""
    lines = [*_coverage(report.coverage or report.imatrix.coverage)]
    told: Mapping[str, JsonValue] = report.fallbacks()
    counts = {key: value for key, value in told.items() if isinstance(value, int) and value}
    if "mlps" in counts:
        worse = counts.get("mlps_worse_than_rtn", 0)
        lines.append(f"{worse:,} of {counts['mlps']:,} MLPs came out worse than plain rounding would have made them.")
    if "searches_kept_rtn" in counts:
        lines.append(f"{counts['searches_kept_rtn']:,} of {counts['searches']:,} searches kept plain rounding.")
    if "rows_kept_rtn" in counts:
        lines.append(f"{counts['rows_kept_rtn']:,} rows were left to plain rounding, which cost them less.")
    if "degenerate" in counts:
        lines.append(f"{counts['degenerate']:,} modules had little to go by; qconv-report.json names them.")
    return tuple(lines)


def _coverage(values: JsonValue) -> list[str]:
    if not isinstance(values, dict):
        return []
    found = {key: value for key, value in values.items() if isinstance(value, int)}
    if not {"experts", "least", "median", "most", "without_tokens"} <= found.keys() or not found["experts"]:
        return []
    line = (
        f"Calibration tokens of an expert: {found['median']:,} in the median, {found['least']:,} the fewest, "
        f"{found['most']:,} the most; {found['without_tokens']:,} of {found['experts']:,} experts saw none."
    )
    shared = found.get("mostly_shared", 0)
    return [f"{line} {shared:,} took at least half of their statistics from their layer." if shared else line]
