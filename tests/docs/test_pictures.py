"""The chart of README and documentation is of the results that are kept, and of one text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from evals.pictures import IMAGES, RESULTS, builds_svg, drawn, series

ROOT = Path(__file__).parents[2]


def results() -> list[Any]:
    return [json.loads((RESULTS / f"{name}.json").read_text()) for name in ("target-sizes", "peers-quality")]


def test_the_chart_is_what_the_results_say() -> None:
    assert (IMAGES / "builds.svg").read_text(encoding="utf-8") == drawn(), "run python -m evals.pictures"


def test_every_file_has_a_mark_within_the_axes() -> None:
    tree = ElementTree.fromstring(drawn())
    circles = list(tree.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(circles) == 3 * 3 + 3  # three sizes of three kinds, and three tools
    assert all(70 < float(one.attrib["cx"]) < 700 and 36 < float(one.attrib["cy"]) < 348 for one in circles)


def test_results_of_different_text_are_not_put_side_by_side() -> None:
    sizes, peers = results()
    peers["tokens"] += 1
    with pytest.raises(ValueError, match="different text"):
        series(sizes, peers)


def test_a_better_build_is_drawn_lower() -> None:
    sizes, peers = results()
    before = builds_svg(series(sizes, peers), 1, 1)
    next(one for one in peers["builds"] if one["build"] == "GPTQModel")["kl"] /= 2
    after = builds_svg(series(sizes, peers), 1, 1)

    def height(text: str) -> float:
        circles = [one for one in ElementTree.fromstring(text).iter() if one.tag.endswith("circle")]
        (mark,) = [one for one in circles if (one[0].text or "").startswith("GPTQModel")]
        return float(mark.attrib["cy"])

    assert height(after) > height(before) + 10


def test_the_pictures_that_pages_show_are_there_and_small() -> None:
    for name in ("builds.svg", "report.png"):
        assert f"docs/images/{name}" in (ROOT / "README.md").read_text(), name
        assert 1000 < (IMAGES / name).stat().st_size < 300_000, name
