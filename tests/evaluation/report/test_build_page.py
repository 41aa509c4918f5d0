"""A build's page: where its error sits, what its experts saw, its bits, as text and without a run."""

from __future__ import annotations

import re
from typing import Any

import pytest

from qconv.errors import ArtifactError
from qconv.evaluation.build_report import BuildReport, parse_report
from qconv.evaluation.report.build_page import build_page
from qconv.evaluation.report.error_view import coverage_lines, error_lines, mean_errors
from tests.evaluation.report.conftest import HOSTILE
from tests.evaluation.report.test_page import Page

BITS = {0: {"self_attn.q_proj": 4.125, "mlp.gate": 16.0}, 1: {"self_attn.q_proj": 4.125, "mlp.gate": 16.0}}
REPORT: dict[str, Any] = {
    "qconv": "0.1",
    "source": "tiny",
    "format": "awq",
    "scheme": "4 bits in groups of 128",
    "quantized_bits_per_weight": 4.1562,
    "parameters": 14961408,
    "calibration_corpus": "python-stdlib",
    "recipe": {"method": ["awq", "gptq"], "skip": []},
    "coverage": {"experts": 4, "least": 0, "median": 6924, "most": 28185, "without_tokens": 1, "mostly_shared": 2},
    "engines": [{"engine": "mlx", "version": "MLX", "verdict": "refused", "findings": [{"what": "reads no AutoAWQ"}]}],
    "layers": [
        {
            "layer": layer,
            "snr_db": {
                f"model.layers.{layer}.self_attn.q_proj": 20.0 - 10.0 * layer,
                f"model.layers.{layer}.mlp.experts.1.up_proj": 20.0,
            },
            "experts": [{"module": f"model.layers.{layer}.mlp.experts.1", "tokens": 7}],
        }
        for layer in range(2)
    ],
}


def page_of(report: dict[str, Any] | None) -> str:
    return build_page("a folder", 9_350_000, 5.0015, BITS, None if report is None else parse_report(report, "report"))


def test_the_page_tells_everything() -> None:
    told = re.sub(r"\s+", " ", Page(page_of(REPORT)).text)
    for one in (
        "tiny, awq",
        "9.35 MB, 5.00 bits per weight over all, 4.16 over the quantized",
        "awq+gptq",
        "squared, in percent: q_proj 5.50, experts.up_proj 1.00",
        "from 1.00 in layer 0 to 5.50 in layer 1",
        "Calibration tokens of an expert: 6,924 in the median, 0 the fewest, 28,185 the most;",
        "1 of 4 experts saw none. 2 took at least half of their statistics from their layer.",
        "Error of every expert's weights",
        "Calibration tokens of every expert",
        "Bits per weight of the files, by layer and role",
        "mlxMLXrefusedreads no AutoAWQ",
        "python-stdlib",
    ):
        assert one in told, one


def test_a_build_of_another_tool_has_its_bits_alone() -> None:
    told = re.sub(r"\s+", " ", Page(page_of(None)).text)
    assert "a folder" in told
    assert "of error and calibration nothing is known" in told
    assert "4.1216.00" in told
    assert "Where the error sits" not in told


def test_the_same_build_has_the_same_page() -> None:
    assert page_of(REPORT) == page_of(dict(reversed(REPORT.items())))


def test_nothing_that_a_report_says_becomes_markup() -> None:
    hostile = {
        **REPORT,
        "source": HOSTILE,
        "scheme": HOSTILE,
        "calibration_corpus": HOSTILE,
        "recipe": {HOSTILE: HOSTILE},
        "engines": [{"engine": HOSTILE, "version": "", "verdict": HOSTILE, "findings": [{"what": HOSTILE}]}],
        "layers": [{"snr_db": {f"model.layers.0.{HOSTILE}": 10.0}}],
    }
    page = Page(page_of(hostile))
    assert {"script", "img", "a"}.isdisjoint(tag for tag, _ in page.tags)
    assert HOSTILE in page.text


@pytest.mark.parametrize(
    "changes", [{"engines": 5}, {"engines": [{"engine": "a"}]}, {"source": 5}, {"parameters": -1}, {"files": [5]}]
)
def test_a_damaged_report_is_named(changes: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=next(iter(changes))):
        page_of(REPORT | changes)


def test_a_report_without_errors_and_coverage_says_nothing_of_them() -> None:
    empty = BuildReport()
    assert error_lines(*mean_errors(empty)) == ()
    assert coverage_lines(empty) == ()
    damaged: list[Any] = [
        5,
        {},
        {"experts": 0, "least": 0, "median": 0, "most": 0, "without_tokens": 0},
        {"experts": "4"},
    ]
    for coverage in damaged:
        assert coverage_lines(BuildReport(coverage=coverage)) == ()
