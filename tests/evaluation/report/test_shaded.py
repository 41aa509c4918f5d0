"""Bits and errors by layer and role, on the page and in Markdown; what was predicted beside what is measured."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import JsonValue

from qconv.errors import ArtifactError
from qconv.evaluation.build_report import parse_report
from qconv.evaluation.kept_files import store_json
from qconv.evaluation.report.charts import SHADES
from qconv.evaluation.report.page import html, markdown
from qconv.evaluation.report.shaded import bits_table, error_table
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
        assert "0.00200 nats a token were predicted; stdlib measured 0.00400, 2.00 times as much" in told
    assert "| 0 | 8.50 |" in text


def test_a_build_without_a_choice_shows_none(tmp_path: Path, write: Write) -> None:
    page = html([view(tmp_path / "run", write())])
    assert "Bits per weight, by layer" not in page
    assert "were predicted" not in page


def test_errors_are_the_mean_over_experts_by_layer_and_role() -> None:
    snr = {
        "model.layers.1.mlp.experts.0.down_proj": 10.0,  # 10 dB: a tenth, 10 %
        "model.layers.1.mlp.experts.1.down_proj": 20.0,  # 1 %
        "model.layers.1.self_attn.q_proj": 30.0,
        "model.layers.1.self_attn.k_proj": None,
        "lm_head": 20.0,
    }
    found = error_table(parse_report({"layers": [{"snr_db": snr}]}, "report"))
    assert found is not None
    assert found.roles == ("experts.down_proj", "q_proj", "lm_head")
    assert [(layer, *(cell and cell[0] for cell in cells)) for layer, cells in found.rows] == [
        ("1", "5.50", "0.100", None),
        ("outside the layers", None, None, "1.00"),
    ]


def test_errors_of_a_gguf_file_are_told_by_tensor() -> None:
    tensors = {
        "token_embd.weight": {"type": "Q4_K", "snr_db": 20.0},
        "blk.0.attn_norm.weight": {"type": "F32", "snr_db": None},
        "blk.0.ffn_down_exps.weight": {"type": "Q6_K", "snr_db": 30.0},
    }
    found = error_table(parse_report({"tensors": tensors}, "report"))
    assert found is not None
    assert found.roles == ("ffn_down_exps", "token_embd")
    assert error_table(parse_report({}, "report")) is None
    with pytest.raises(ArtifactError, match="tensors"):
        parse_report({"tensors": {"a": {"snr_db": "loud"}}}, "report")
