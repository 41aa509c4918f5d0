"""Model cards: whatever a model, a corpus or a recipe is called, a card has the headings and links that qconv wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from qconv.building.gguf_report import model_card
from qconv.building.report import Report
from qconv.folders.state import REPORT_NAME

HOSTILE = "x](http://a.example) <b>y</b>\n# head\n![i](http://b.example) `code` ``` | www.c.example &lt;"


def parsed(card: str) -> list[Token]:
    """A card without its front matter."""
    front, body = card.removeprefix("---\n").split("---\n", 1)
    assert isinstance(yaml.safe_load(front), dict)
    return MarkdownIt("commonmark").enable("table").parse(body)


def structure(card: str) -> list[str]:
    """The kinds of a card's parts in order, those within lines too; text and how it is escaped aside."""
    found = []
    for token in parsed(card):
        found.append(token.type)
        found += [child.type for child in token.children or [] if child.type not in ("text", "text_special")]
    return found


def renamed(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A report of a model, a corpus and a recipe of such names."""
    changed: dict[str, Any] = json.loads(json.dumps(values))
    changed["source"] = name
    changed["recipe"]["skip"] = [name]
    if changed.get("calibration_corpus"):
        changed["calibration_corpus"] = name
    if changed.get("imatrix"):
        changed["imatrix"]["datasets"] = [name]
    if "files" in changed:
        changed["files"] = [f"{name}.gguf"]
    return changed


@pytest.mark.parametrize("fixture", ["rtn_build", "awq_build"])
def test_names_are_no_markup_in_a_builds_card(fixture: str, request: pytest.FixtureRequest) -> None:
    build: Path = request.getfixturevalue(fixture)
    values = json.loads((build / REPORT_NAME).read_text())
    plain = Report(renamed(values, "plain")).model_card()
    assert structure(Report(renamed(values, HOSTILE)).model_card()) == structure(plain)
    assert Report(values).model_card() == (build / "README.md").read_text()


@pytest.mark.parametrize("files", [1, 2])
def test_names_are_no_markup_in_a_gguf_builds_card(files: int) -> None:
    coverage = {"covered": 1, "weights": 1, "experts": 0, "weakest": []}
    values = {
        "qconv": "1",
        "source": "plain",
        "format": "gguf:Q8_0",
        "recipe": {"format": "gguf"},
        "imatrix": {"datasets": ["plain"], "file": None, "coverage": coverage},
        "parameters": 10,
        "bits_per_weight": 8.5,
        "files": ["plain.gguf"],
        "tensors": {"output.weight": {"type": "Q8_0", "snr_db": 40.0}},
    }
    plain, hostile = (renamed(values, name) for name in ("plain", HOSTILE))
    for one in (plain, hostile):
        one["files"] *= files
    assert structure(model_card(hostile)) == structure(model_card(plain))
