"""A build's own report as evaluation reads it: what is damaged is corrupt and named, what is absent is unknown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qconv.errors import ArtifactError
from qconv.evaluation.artifacts import identify
from qconv.evaluation.run_folder import KEY_NAME, kept_report, require_key
from qconv.folders.state import REPORT_NAME

DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "layers as a number": lambda report: report.update(layers=5),
    "a layer as a number": lambda report: report.update(layers=[5]),
    "searches as a list": lambda report: report["layers"][0].update(searches=[1]),
    "a search that says nothing": lambda report: report["layers"][0].update(searches={"a": {"kept_rtn": "perhaps"}}),
    "an expert without tokens": lambda report: report["layers"][0].update(experts=[{"module": "a"}]),
    "a figure as text": lambda report: report["layers"][0].update(snr_db={"a": "loud"}),
    "the recipe as a number": lambda report: report.update(recipe=5),
    "the format as a number": lambda report: report.update(format=5),
    "bits as text": lambda report: report.update(bits_per_weight="few"),
}


@pytest.fixture
def copy(rtn_build: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(rtn_build, tmp_path / "build"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_report_is_corrupt(copy: Path, damage: str) -> None:
    report = json.loads((copy / REPORT_NAME).read_text())
    DAMAGES[damage](report)
    (copy / REPORT_NAME).write_text(json.dumps(report))
    with pytest.raises(ArtifactError, match=REPORT_NAME) as caught:
        identify(copy)
    assert caught.value.hint


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b"[" * 10**5])
def test_a_report_that_is_none_is_corrupt(copy: Path, tmp_path: Path, data: bytes) -> None:
    (copy / REPORT_NAME).write_bytes(data)
    with pytest.raises(ArtifactError, match=REPORT_NAME):
        identify(copy)


def test_a_report_that_tells_less_is_no_damage(copy: Path) -> None:
    known = identify(copy)
    report = json.loads((copy / REPORT_NAME).read_text())
    less = {key: value for key, value in report.items() if key not in ("recipe", "layers")} | {"coverage": None}
    (copy / REPORT_NAME).write_text(json.dumps(less))
    found = identify(copy)
    assert found.sha256 == known.sha256
    assert (found.method, found.recipe_sha256) == (None, None)
    (copy / REPORT_NAME).write_text(json.dumps(report | {"recipe": {"method": "newer", "key": 1}}))
    newer = identify(copy)
    assert newer.method == "newer"
    assert newer.recipe_sha256 not in (None, known.recipe_sha256)
    (copy / REPORT_NAME).unlink()
    assert identify(copy).format is None
    assert kept_report(copy, copy) is None


@pytest.mark.parametrize("data", [b"\xe7\xff", b"[]", b'{"a":', b'{"build":5}', b"[" * 10**5])
def test_a_damaged_key_of_an_unfinished_run_is_corrupt(tmp_path: Path, data: bytes) -> None:
    work = tmp_path / "work"
    require_key(work, {"build": "a"})
    require_key(work, {"build": "a"})
    (work / KEY_NAME).write_bytes(data)
    with pytest.raises(ArtifactError, match=KEY_NAME) as caught:
        require_key(work, {"build": "a"})
    assert str(work) in str(caught.value.hint)
