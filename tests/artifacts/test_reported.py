"""The report of a build: whatever damage, one error that names it; what its readers take is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qconv.artifacts.reported import has_report, read_report
from qconv.errors import CheckpointError
from qconv.folders.state import REPORT_NAME


@pytest.fixture(scope="module")
def sound(awq_build: Path) -> dict[str, Any]:
    """A calibrated build's report."""
    return read_report(awq_build)


def test_a_sound_report_is_given_as_it_is(awq_build: Path, sound: dict[str, Any]) -> None:
    assert sound == json.loads((awq_build / REPORT_NAME).read_text())
    assert sound["layers"][0]["experts"]
    assert sound["coverage"] is not None


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Put a value at a dotted path; ``...`` removes it."""

    def edit(report: dict[str, Any]) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        place: Any = report
        for part in parents:
            place = place[part]
        if value is ...:
            del place[last]
        else:
            place[last] = value

    return edit


DAMAGES = {
    **{f"without {key}": (key, ...) for key in ("qconv", "source", "format", "fingerprints", "recipe", "layers")},
    **{f"without {key}": (key, ...) for key in ("coverage", "degenerate", "parameters", "bits_per_weight")},
    "layers a number": ("layers", 5),
    "a layer null": ("layers.0", None),
    "a fingerprint a number": ("fingerprints", {"weights": 5}),
    "coverage a list": ("coverage", [1]),
    "coverage without median": ("coverage.median", ...),
    "a ratio a text": ("layers.0.snr_db", {"model.layers.0.self_attn.q_proj": "12.5"}),
    "bits a text": ("bits_per_weight", "4.2"),
    "parameters negative": ("parameters", -1),
    "a search without its outcome": ("layers.0.searches", {"q": {}}),
    "an expert without its loss": ("layers.0.experts.0.loss", ...),
    "degenerate a number": ("degenerate", 7),
    "method a mapping": ("recipe.method", {}),
    "format a list": ("format", ["awq"]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(sound: dict[str, Any], tmp_path: Path, name: str) -> None:
    report = json.loads(json.dumps(sound))
    path, value = DAMAGES[name]
    change(path, value)(report)
    (tmp_path / REPORT_NAME).write_text(json.dumps(report))
    with pytest.raises(CheckpointError, match=r"qconv-report\.json: damaged: ") as caught:
        read_report(tmp_path)
    assert path.split(".")[0] in caught.value.message
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"bits_per_weight": NaN}', "\ud800"])
def test_text_that_is_no_report(tmp_path: Path, text: str) -> None:
    (tmp_path / REPORT_NAME).write_bytes(text.encode(errors="surrogatepass"))
    assert has_report(tmp_path)
    with pytest.raises(CheckpointError, match=r"qconv-report\.json"):
        read_report(tmp_path)


def test_the_reports_of_gguf_and_of_an_imatrix_are_told_apart(tmp_path: Path) -> None:
    common = {"qconv": "1", "source": "m", "fingerprints": {"weights": "ab"}}
    coverage = dict.fromkeys(("experts", "least", "median", "most", "without_tokens", "mostly_shared"), 1)
    coverage |= {"weights": 3, "covered": 3}
    gguf: dict[str, Any] = {
        **common,
        "format": "gguf:Q8_0",
        "recipe": {},
        "bits_per_weight": 8.5,
        "parameters": 9,
        "files": ["m.gguf"],
        "tensors": {"output.weight": {"type": "Q8_0", "snr_db": None}},
        "imatrix": None,
    }
    imatrix = {**common, "format": "imatrix", "datasets": [], "coverage": coverage}
    for report in (gguf, {**gguf, "imatrix": {"datasets": [], "file": None, "coverage": coverage}}, imatrix):
        (tmp_path / REPORT_NAME).write_text(json.dumps(report))
        assert read_report(tmp_path) == report
    for report in (
        {**gguf, "files": []},
        {**gguf, "tensors": {"a": 1}},
        {**gguf, "imatrix": {}},
        {**imatrix, "coverage": {}},
    ):
        (tmp_path / REPORT_NAME).write_text(json.dumps(report))
        with pytest.raises(CheckpointError, match="damaged"):
            read_report(tmp_path)
