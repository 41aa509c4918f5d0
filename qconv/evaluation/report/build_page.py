"""A build as one offline page: its error by layer and role, what each expert saw, its bits, what engines make of it.

From the build's own report and its files' headers; no weight is read, and nothing depends on the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import yaml

from qconv.evaluation.build_report import BuildReport
from qconv.evaluation.report.error_view import error_lines, error_view, mean_errors
from qconv.evaluation.report.figures import nbytes as size_words
from qconv.evaluation.report.page import rendered
from qconv.evaluation.report.shaded import shaded, short_role
from qconv.evaluation.report.task_view import Table

GENERATOR = "qconv inspect"
"""Named in a page's head: what has it may be replaced by another such page."""


def build_page(
    name: str,
    nbytes: int,
    bits_per_weight: float | None,
    bits: Mapping[int, Mapping[str, float]],
    report: BuildReport | None,
) -> str:
    """The page of a build.

    Args:
        name: The build's, for the title of one that has no report.
        nbytes: Bytes of its tensors.
        bits_per_weight: Over all of its weights.
        bits: Bits per weight by layer and role, from the headers.
        report: What the build says of itself; None for one that qconv did not make.
    """
    told = BuildReport() if report is None else report
    source = name if told.source is None else f"{told.source}, {told.format}"
    return rendered(
        "build.html.j2",
        generator=GENERATOR,
        title=source,
        summary=_summary(nbytes, bits_per_weight, told),
        known=report is not None,
        error=replace(error_view(told), bits=None),  # the headers tell it of every build
        lines=error_lines(*mean_errors(told)),
        bits=shaded([(str(layer), _short(roles)) for layer, roles in bits.items()], lambda one: f"{one:.2f}"),
        engines=_engines(told),
        recipe=yaml.safe_dump(told.recipe, sort_keys=False) if told.recipe else "",
    )


def _short(roles: Mapping[str, float]) -> dict[str, float]:
    return {short_role(role): bits for role, bits in roles.items()}


def _summary(nbytes: int, bits_per_weight: float | None, report: BuildReport) -> list[tuple[str, str]]:
    bits = "" if bits_per_weight is None else f", {bits_per_weight:.2f} bits per weight over all"
    if report.quantized_bits_per_weight is not None:
        bits += f", {report.quantized_bits_per_weight:.2f} over the quantized"
    corpus = report.calibration_corpus or "; ".join(report.imatrix.datasets) or None
    facts = [
        ("size", f"{size_words(nbytes)}{bits}"),
        ("weights", None if report.parameters is None else f"{report.parameters:,}"),
        ("scheme", report.scheme),
        ("method", report.method or report.rounded_by),
        ("calibrated on", corpus),
        ("made by", None if report.qconv is None else f"qconv {report.qconv}"),
    ]
    return [(key, value) for key, value in facts if value]


def _engines(report: BuildReport) -> Table | None:
    """What engines make of it, by rules; None where the report does not say."""
    if not report.engines:
        return None
    rows = tuple(
        (one.engine, one.version, one.verdict, "; ".join(finding.what for finding in one.findings))
        for one in report.engines
    )
    note = "By rules of which each has a source, without a run here; qconv check names the sources and remedies."
    return Table("Engines", ("engine", "version", "verdict", "why"), rows, note)
