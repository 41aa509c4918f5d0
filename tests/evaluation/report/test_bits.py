"""A mixture's bits on the page and in Markdown, and what was predicted beside what is measured."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import JsonValue

from qconv.errors import ArtifactError
from qconv.evaluation.build_report import parse_report
from qconv.evaluation.kept_files import store_json
from qconv.evaluation.report.bits import bits_table
from qconv.evaluation.report.charts import SHADES
from qconv.evaluation.report.page import html, markdown
from qconv.evaluation.report.view import view
from tests.evaluation.report.conftest import HOSTILE, Write

LAYERS: list[JsonValue] = [
    {"layer": 0, "roles": {"attn_q": 8.5, "ffn_up_exps": 3.4375}},
    {"layer": 1, "roles": {"attn_q": 5.5, HOSTILE: 4.5}},
]


def test_shades_follow_bits() -> None:
    found = bits_table(parse_report({"bits_by_layer": LAYERS}, "report"))
    assert found is not None
    assert found.roles == ("attn_q", "ffn_up_exps", HOSTILE)
    assert found.rows[0] == ("0", (("8.50", SHADES - 1), ("3.44", 0), None))
    (_, (first, absent, last)) = found.rows[1]
    assert absent is None
    assert first is not None
    assert last is not None
    assert 0 < last[1] < first[1] < SHADES - 1
    same = bits_table(parse_report({"bits_by_layer": [{"layer": 0, "roles": {"q": 4.0, "k": 4.0}}]}, "report"))
    assert same is not None
    assert {cell for cell in same.rows[0][1] if cell is not None} == {("4.00", 0)}
    assert bits_table(parse_report({}, "report")) is None


@pytest.mark.parametrize("bits", [-1.0, "many", {"q": float("nan")}, None])
def test_bits_that_are_none_are_refused(bits: object) -> None:
    roles = bits if isinstance(bits, dict) else {"q": bits}
    with pytest.raises(ArtifactError, match="bits_by_layer"):
        parse_report({"bits_by_layer": [{"layer": 0, "roles": roles}]}, "report")


def test_the_page_has_bits_and_both_divergences(tmp_path: Path, write: Write) -> None:
    report: JsonValue = {"bits_by_layer": LAYERS, "allocation": {"predicted_kld": 0.002}}
    run = write()
    shown = view(tmp_path / "run", run.model_copy(update={"build_report": store_json(tmp_path / "run", report)}))
    page, text = html([shown]), markdown([shown])
    assert "Bits per weight, by layer and role" in page
    assert f'<td class="shade{SHADES - 1}">8.50</td>' in page
    assert HOSTILE not in page
    for told in (page, text):
        assert "0.002 nats were predicted; stdlib measured 0.004, 2 times as much" in told
    assert "| 0 | 8.50 |" in text


def test_a_build_without_a_choice_shows_none(tmp_path: Path, write: Write) -> None:
    page = html([view(tmp_path / "run", write())])
    assert "Bits per weight, by layer" not in page
    assert "were predicted" not in page
