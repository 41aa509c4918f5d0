"""The report: everything is on the page, as text, with nothing loaded from elsewhere."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from markdown_it import MarkdownIt

from qconv.boundary.printable import printable
from qconv.errors import ArtifactError
from qconv.evaluation.build_report import parse_report
from qconv.evaluation.history import History
from qconv.evaluation.kept_files import FILES_FOLDER
from qconv.evaluation.report.charts import Scale, TrendPoint, heat_map, histogram, trend
from qconv.evaluation.report.experts import ExpertMaps, expert_maps
from qconv.evaluation.report.page import html, junit, markdown, write_report
from qconv.evaluation.report.view import view
from tests.evaluation.report.conftest import HOSTILE, Write

VOID = {"meta", "br", "rect", "line", "circle", "path", "polyline"}


class Page(HTMLParser):
    """Collects text and tags, and checks that what is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_tells_everything(tmp_path: Path, write: Write) -> None:
    page = Page(html([view(tmp_path / "run", write())]))
    for told in (
        "Regression: 1 of 3 gates failed.",
        "KL divergence",
        "How far the build's probabilities of the next token are from the reference's",
        "0.00400 nats a token",
        "0.00360 to 0.00440",
        "66.7 %",
        "HumanEval/1 lost: reference pass, build fail, first differing token 1",
        "HumanEval/2 gained",
        "qconv eval run 'a folder' --suite smoke",
        "Error of every expert's weights",
        "Calibration tokens of every expert",
        "model.layers.3.mlp.experts.5.down_proj",
        "no statement of a model's capability",
    ):
        assert told in re.sub(r"\s+", " ", page.text), told
    assert "HumanEval/3" not in page.text, "only what flipped is shown"
    assert HOSTILE in page.text


def test_nothing_a_model_wrote_becomes_markup_and_nothing_is_loaded(tmp_path: Path, write: Write) -> None:
    run = write()
    build = run.build.model_copy(update={"name": HOSTILE, "path": HOSTILE})
    made = html([view(tmp_path / "run", run.model_copy(update={"build": build, "command": (HOSTILE,)}))])
    page = Page(made)
    assert "script" not in {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not {"src", "onclick", "onload"} & attributes.keys(), tag
        assert (attributes.get("href") or "#").startswith("#"), tag
    assert "url(" not in made
    assert "http" not in made.replace("http-equiv", "")


def test_a_report_of_several_runs_compares_them(tmp_path: Path, write: Write) -> None:
    one, other = write("one", 0.001), write("other", 0.002)
    views = [view(tmp_path / name, run) for name, run in (("one", one), ("other", other))]
    text = markdown(views).replace("\\", "")  # as it is shown
    assert "| size | bits per weight | stdlib: KL divergence, nats a token | humaneval: Solved at the first" in text
    assert "0.00100 (0.00090 to 0.00110)" in text
    assert "0.00200 (0.00180 to 0.00220)" in text
    assert "Lost: HumanEval/1. Gained: HumanEval/2." in text
    assert "2 runs of tiny-awq, 2026-01-01" in Page(html(views)).text


def test_names_are_no_markup_in_markdown_and_xml(tmp_path: Path, write: Write) -> None:
    name = "x](http://a.example) <b>\n# head ``` \x1b[2J |"
    kinds, run = [], write()
    for one in ("plain", name):
        build = run.build.model_copy(update={"name": one, "path": one})
        views = [view(tmp_path / "run", run.model_copy(update={"build": build, "command": (one,)}))]
        (suite,) = ElementTree.fromstring(junit(views))  # no control character, which XML has no form for
        assert (suite.get("name") or "").startswith(printable(one))
        tokens = MarkdownIt("commonmark").enable("table").parse(markdown(views))
        inner = [child.type for token in tokens for child in token.children or []]
        kinds.append(([token.type for token in tokens], [kind for kind in inner if not kind.startswith("text")]))
    assert kinds[0] == kinds[1]


def test_junit_fails_what_failed_and_skips_what_cannot_tell(tmp_path: Path, write: Write) -> None:
    (suite,) = ElementTree.fromstring(junit([view(tmp_path / "run", write())]))
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("3", "1", "1")
    kinds = [[child.tag for child in case] for case in suite]
    assert kinds == [[], ["failure"], ["skipped"]]


def test_every_form_is_written(tmp_path: Path, write: Write) -> None:
    paths = write_report(tmp_path, [view(tmp_path / "run", write())])
    assert [path.name for path in paths] == ["report.html", "report.md", "junit.xml", "report.json"]
    (record,) = json.loads(paths[3].read_text())
    assert record["verdict"]["outcome"] == "regression"


def test_trends_and_changes_come_from_the_history(tmp_path: Path, write: Write) -> None:
    with History.open(tmp_path / "history") as history:
        for day in (1, 2, 3):
            run = write(str(day), 0.001 * day, started=f"2026-01-0{day}T00:00:00+00:00", versions={"torch": str(day)})
            history.add(tmp_path / str(day), run)
        page = Page(html([view(tmp_path / "3", run, history)]))
    told = re.sub(r"\s+", " ", page.text)
    assert "stdlib: KL divergence, the last 3 runs" in told
    assert "0.00300 nats a token, 0.002 before." in told
    assert "Since the run of 2026-01-02T00:00:00+00:00: versions: torch 2 -> 3." in told


def test_a_damaged_file_is_refused(tmp_path: Path, write: Write) -> None:
    run = write()
    file = tmp_path / "run" / FILES_FOLDER / run.tasks[0].files["tokens"].name
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match="damaged"):
        view(tmp_path / "run", run)


def maps_of(layers: list[object]) -> ExpertMaps | None:
    return expert_maps(parse_report({"layers": layers}, "report"))


def test_maps_hold_the_worst_linear_of_each_expert() -> None:
    snr = {"a.experts.0.gate_proj": 10.0, "a.experts.0.down_proj": 20.0, "a.experts.2.up_proj": None, "q": 3.0}
    maps = maps_of([{"snr_db": snr | {"a.experts.2.down_proj": 30.0}}])
    assert maps is not None
    assert maps.error is not None
    assert maps.error[0, 0] == pytest.approx(10.0)  # 10 dB: a tenth
    assert np.isnan(maps.error[0, 1])
    assert maps.error[0, 2] == pytest.approx(0.1)
    assert maps.tokens is None
    assert maps_of([]) is None
    assert maps_of([{"snr_db": {"q": 3.0}}]) is None
    seen = maps_of([{"experts": [{"module": "blk.0.experts.1", "tokens": 7}]}])  # of GGUF
    assert seen is not None
    assert seen.error is None
    assert seen.tokens is not None
    assert seen.tokens[0, 1] == 7.0


@pytest.mark.parametrize("log", [False, True])
def test_a_scale_is_monotonic_and_keeps_to_its_ends(log: bool) -> None:
    scale = Scale(0.01, 100.0, 10.0, 90.0, log)
    places = [scale(value) for value in (0.001, 0.01, 0.5, 20.0, 100.0, 1e9)]
    assert places == sorted(places)
    assert (places[0], places[-1]) == (10.0, 90.0)
    assert all(0.01 <= tick <= 100.0 for tick in scale.ticks())
    assert Scale(5.0, 5.0, 0.0, 10.0)(5.0) == 5.0


def test_charts_of_nothing_and_of_extremes_are_still_charts() -> None:
    for made in (
        histogram(np.zeros(5, dtype=np.float32), [], unit="nats"),
        histogram(np.array([np.inf, 1.0, 0.0], dtype=np.float32), [("mean", 0.0)], unit="nats"),
        trend([TrendPoint("<a>", None, None, None, False)], None, unit=""),
        trend([TrendPoint("<a>", 1.0, None, None, True)], 0.5, unit="<u>"),
        heat_map(np.full((2, 3), np.nan), rows="layer", columns="experts"),
        heat_map(np.array([[1.0]]), rows="layer", columns="experts"),
    ):
        assert "nan" not in made
        ElementTree.fromstring(made)
        assert "<a>" not in made


def test_a_heat_map_of_the_largest_model_stays_small() -> None:
    made = heat_map(np.random.default_rng(0).random((62, 160)), rows="layer", columns="experts")
    assert len(made) < 400_000
