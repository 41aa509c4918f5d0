"""The report in a real browser: light and dark, on a desk and on a phone, offline, and with hostile answers in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import JsonValue

from qconv.evaluation.blaming import BLAME_NAME
from qconv.evaluation.build_report import parse_report
from qconv.evaluation.history import History
from qconv.evaluation.kept_files import store_json
from qconv.evaluation.report.build_page import build_page
from qconv.evaluation.report.page import html
from qconv.evaluation.report.view import view
from tests.evaluation.report.chromium import Chromium, Device, find_chromium
from tests.evaluation.report.conftest import Write

DESK, PHONE = (1280, 900), (390, 844)
DEVICES = [
    Device(*size, scheme, mobile=size is PHONE) for size in (DESK, PHONE) for scheme in ("light", "dark")
]  # fmt: skip
LEAST_CONTRAST = 4.5
"""WCAG 2.2, success criterion 1.4.3, level AA."""
LEAST_PIXELS = 9.0
"""Below this no text is read on a phone."""

HOSTILE = (
    "</script></pre></span></details></style><script>window.owned = 1; alert(1)</script>"
    "<img src=x onerror='window.owned = 2'><svg onload='window.owned = 3'></svg>"
    "<iframe srcdoc='<script>parent.owned = 4</script>'></iframe><a href='javascript:owned=5'>x</a>"
    "<link rel=stylesheet href='http://192.0.2.1/x.css'><base href='http://192.0.2.1/'> {{ 7 * 7 }} &lt;"
)
"""What a model, a folder or a recipe may be made to say."""

CONTRASTS = """(() => {
  const parsed = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n };
  const over = (top, under) => top.slice(0, 3).map((c, i) => c * top[3] + under[i] * (1 - top[3]));
  const light = (rgb) => rgb.map((c) => c / 255).map((c) => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const ground = (element) => {
    const layers = [];
    for (let one = element; one; one = one.parentElement) layers.push(parsed(getComputedStyle(one).backgroundColor));
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
  };
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement;
    if (!node.data.trim() || element.closest('title')) continue;
    const style = getComputedStyle(element), under = ground(element);
    const ink = over(parsed(element.ownerSVGElement ? style.fill : style.color), under);
    const [one, other] = [light(ink), light(under)];
    found.push([(Math.max(one, other) + .05) / (Math.min(one, other) + .05), node.data.trim().slice(0, 40)]);
  }
  return found;
})()"""

# Boxes that may scroll by themselves are the only ones that may be wider than they look.
OVERFLOWS = """(() => {
  const found = [];
  if (document.documentElement.scrollWidth > innerWidth) found.push(['page', document.documentElement.scrollWidth]);
  for (const one of document.querySelectorAll('body *')) {
    if (one.closest('svg')) continue;
    const style = getComputedStyle(one);
    if (style.display === 'inline' || ['auto', 'scroll'].includes(style.overflowX)) continue;
    if (one.clientWidth && one.scrollWidth > one.clientWidth + 1) found.push([one.tagName, one.textContent]);
    const box = one.getBoundingClientRect(), scroller = one.closest('.scroll, pre');
    if (!scroller && box.right > innerWidth + 1) found.push([one.tagName, box.right]);
  }
  return found;
})()"""

CHARTS = """[...document.querySelectorAll('figure')].map((figure) => {
  const svg = figure.querySelector('svg'), box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
  const texts = [...svg.querySelectorAll('text')].map((text) => [text.textContent, text.getBBox()]);
  const boxes = texts.map(([_, b]) => [b.x, b.y, b.x + b.width, b.y + b.height]);
  const apart = (a, b) => a[2] <= b[0] + 1 || b[2] <= a[0] + 1 || a[3] <= b[1] + 4 || b[3] <= a[1] + 4;
  return {
    title: figure.querySelector('figcaption').textContent,
    width: box.width, height: box.height,
    outside: texts.filter(([_, b]) => b.x < -.5 || b.y < -.5 || b.x + b.width > view.width + .5
      || b.y + b.height > view.height + .5).map(([text]) => text),
    overlapping: boxes.flatMap((a, i) => boxes.slice(i + 1).map((b, k) => [a, b, texts[i][0], texts[i + 1 + k][0]]))
      .filter(([a, b]) => !apart(a, b)).map(([a, b, one, other]) => [one, other]),
    hidden: boxes.filter((a) => [...svg.querySelectorAll('.bar, path')].map((one) => one.getBBox())
      .some((b) => !apart(a, [b.x, b.y, b.x + b.width, b.y + b.height]))).length,
    pixels: Math.min(...[...svg.querySelectorAll('text')].map((text) =>
      parseFloat(getComputedStyle(text).fontSize) * box.width / view.width)),
    cells: [...svg.querySelectorAll('path')].map((path) => (path.getAttribute('d').match(/M/g) || []).length)
      .reduce((sum, count) => sum + count, 0),
    shapes: svg.querySelectorAll('rect, circle, path, polyline').length,
  };
})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium (Debian: apt-get install chromium): the report is NOT tested in a browser")
    with Chromium(executable, tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def page(write: Write, tmp_path: Path) -> Path:
    """A report of two runs with everything on it: trends, maps, flips, blame."""
    with History.open(tmp_path / "history") as history:
        views = []
        for day in (1, 2, 3):
            folder = tmp_path / str(day)
            run = write(str(day), 0.001 * day, started=f"2026-01-0{day}T00:00:00+00:00")
            costs = [
                {"part": f"model.layers.{index}.mlp.experts.{index}", "layer": index, "kld": 0.01 / (1 + index),
                 "error": 1e-4, "layer_without": 0.001}
                for index in range(8)
            ]  # fmt: skip
            blame = {
                "baseline": "before",
                "tokens": 9,
                "whole": {"part": "build", "layer": None, "kld": 0.02, "error": 1e-3},
            }
            (folder / BLAME_NAME).write_text(json.dumps({**blame, "layers": costs, "parts": costs}))
            history.add(folder, run)
            views.append(view(folder, run, history))
        path = tmp_path / "report.html"
        path.write_text(html(views[1:]))
    return path


@pytest.mark.parametrize("device", DEVICES, ids=lambda one: f"{one.width}-{one.scheme}")
def test_it_works_on_every_screen(device: Device, browser: Chromium, page: Path, tmp_path: Path) -> None:
    seen = browser.open(page, device)
    assert browser.evaluate("innerWidth") == device.width
    assert browser.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") is (device.scheme == "dark")
    browser.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    contrasts = browser.evaluate(CONTRASTS)
    assert len(contrasts) > 200
    assert [one for one in contrasts if one[0] < LEAST_CONTRAST] == []
    assert browser.evaluate(OVERFLOWS) == []
    charts: list[dict[str, Any]] = browser.evaluate(CHARTS)
    assert len(charts) == 1 + 2 * 5, "builds by size, and of each run a histogram, two trends and two maps"
    for chart in charts:
        assert min(chart["width"], chart["height"], chart["shapes"]) > 0, chart
        assert (chart["outside"], chart["overlapping"], chart["hidden"]) == ([], [], 0), chart["title"]
        assert chart["pixels"] >= LEAST_PIXELS, chart["title"]
    assert (seen.requests, seen.complaints) == ([page.as_uri()], []), "nothing is loaded, nothing complains"
    assert browser.evaluate("document.body.innerText.includes('how much more than of before')")
    browser.screenshot(tmp_path / "page.png")  # to be looked at


@pytest.fixture
def many(write: Write, tmp_path: Path) -> Path:
    """Twelve builds with long names, each with nine gates, some failing, some that cannot tell."""
    views = []
    with History.open(tmp_path / "history") as history:
        for number in range(12):
            name = f"qwen3-coder-480b-a35b-instruct-w4a16-{'x' * number}"
            status = ("pass", "fail", "inconclusive")[number % 3]
            outcome = {"pass": "pass", "fail": "regression", "inconclusive": "inconclusive"}[status]
            run = write(name, 0.001 * (1.02 if number < 10 else 1.5) ** number)
            gates = tuple(
                gate.model_copy(update={"status": status, "task": task, "against": against})
                for task in ("stdlib", "a-long-name-of-a-task")
                for against in ("reference", "baseline")
                for gate in run.gates[:2]
            )
            size = 5 * 10**9 + (10**7 if number < 10 else 10**9) * number  # ten that crowd, two far away
            changes = {
                "build": run.build.model_copy(update={"name": name, "size": size, "sha256": f"{number:064x}"}),
                "gates": gates,
                "verdict": run.verdict.model_copy(update={"outcome": outcome}),
            }
            for day in (1, 2, 3):
                again = run.model_copy(update={**changes, "started": f"2026-01-0{day}T00:00:00+00:00"})
                history.add(tmp_path / name, again)
            views.append(view(tmp_path / name, again, history))
    path = tmp_path / "many.html"
    path.write_text(html(views))
    return path


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """The page of a build with everything on it, of a model as deep and wide as people have."""
    bits = {layer: {f"self_attn.{name}_proj": 4.125 for name in "qkvo"} for layer in range(62)}
    layers = [
        {
            "snr_db": {
                f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj": 15.0 + expert % 7
                for expert in range(160)
                for name in ("gate", "up", "down")
            },
            "experts": [
                {"module": f"model.layers.{layer}.mlp.experts.{expert}", "tokens": 10 * expert} for expert in range(160)
            ],
        }
        for layer in range(62)
    ]
    report = {"source": HOSTILE, "scheme": HOSTILE, "layers": layers, "recipe": {"method": "gptq"}}
    path = tmp_path / "build.html"
    path.write_text(build_page("build", 10**9, 4.1, bits, parse_report(report, "report")))
    return path


@pytest.mark.parametrize("device", [*DEVICES, Device(1000, 900, "light")], ids=lambda one: f"{one.width}-{one.scheme}")
def test_a_build_has_a_page_on_every_screen(device: Device, browser: Chromium, build: Path) -> None:
    seen = browser.open(build, device)
    browser.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    assert [one for one in browser.evaluate(CONTRASTS) if one[0] < LEAST_CONTRAST] == []
    assert browser.evaluate(OVERFLOWS) == []
    assert browser.evaluate("document.querySelectorAll('script, img, iframe, a, link, base, [onload]').length") == 0
    charts = browser.evaluate(CHARTS)
    assert [chart["cells"] for chart in charts] == [62 * 160] * 2
    assert all((chart["outside"], chart["overlapping"], chart["hidden"]) == ([], [], 0) for chart in charts)
    assert (seen.requests, seen.complaints) == ([build.as_uri()], [])
    if not device.mobile:
        assert browser.evaluate(SCROLLING) == []


SCROLLING = """[...document.querySelectorAll('.scroll, pre')].filter((one) => one.scrollWidth > one.clientWidth + 1)
  .map((one) => [one.textContent.trim().slice(0, 40), one.scrollWidth, one.clientWidth])"""


@pytest.mark.parametrize("width", [1000, 1280])
def test_nothing_scrolls_sideways(width: int, browser: Chromium, page: Path, many: Path) -> None:
    for one in (page, many):
        browser.open(one, Device(width, 900, "light"))
        browser.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true })")
        assert browser.evaluate(SCROLLING) == []
        assert browser.evaluate(OVERFLOWS) == []


def test_the_first_screen_answers_which_build_to_take(browser: Chromium, page: Path) -> None:
    browser.open(page, DEVICES[0])
    bottoms = browser.evaluate(
        "['.verdict', '.first figure', '.first li', '.matrix'].map((one) =>"
        " document.querySelector(one).getBoundingClientRect().bottom)"
    )
    assert max(bottoms) < DESK[1]
    assert browser.evaluate("document.querySelectorAll('.first .point').length") == 2


def test_many_builds_are_told_apart_without_colour(browser: Chromium, many: Path) -> None:
    browser.open(many, Device(1000, 900, "light"))
    cells = browser.evaluate(
        "[...document.querySelectorAll('.matrix td')].filter((one) => /pass|fail|unsure/.test(one.className))"
        ".map((one) => [one.className.split(' ')[0], one.innerText[0]])"
    )
    signs = {"pass": "✓", "fail": "✗", "unsure": "?"}
    assert len(cells) == 12 * 9 + 12  # eight gates in two tables, and twice the name
    assert {style for style, _ in cells} == signs.keys()
    assert all(signs[style] == sign for style, sign in cells)
    shapes = browser.evaluate(
        "[...document.querySelectorAll('.first .point')].map((one) =>"
        " [one.getAttribute('class'), one.getAttribute('d').replace(/-?[\\d.]+/g, '')])"
    )
    assert len(shapes) == 12
    assert len({shape for _, shape in shapes}) == 3
    assert len({tuple(one) for one in shapes}) == 3
    assert browser.evaluate("document.querySelectorAll('.matrix svg.spark').length") == 2 * 12
    (chart,) = [one for one in browser.evaluate(CHARTS) if "against size" in one["title"]]
    assert (chart["outside"], chart["overlapping"], chart["hidden"]) == ([], [], 0)


def test_every_sign_leads_to_what_it_says(browser: Chromium, many: Path) -> None:
    browser.open(many, DEVICES[0])
    targets = browser.evaluate("[...document.querySelectorAll('a')].map((one) => one.getAttribute('href').slice(1))")
    assert len(set(targets)) == 12 * 9
    missing = f"{json.dumps(targets)}.filter((one) => document.querySelectorAll('#' + one).length !== 1)"
    assert browser.evaluate(missing) == []
    told = browser.evaluate("document.querySelector(document.querySelectorAll('.matrix a')[2].hash).innerText")
    assert "KL divergence" in told or "Perplexity" in told


def test_paper_has_what_a_click_opens(browser: Chromium, page: Path) -> None:
    shown = "[...document.querySelectorAll('details dl, details .pair')].map((one) => one.checkVisibility())"
    browser.open(page, DEVICES[0])
    assert not any(browser.evaluate(shown))
    browser.open(page, Device(794, 1123, "light", media="print"))
    assert len(browser.evaluate(shown)) == 2 * 3
    assert all(browser.evaluate(shown))


def test_dark_is_dark_and_light_is_light(browser: Chromium, page: Path) -> None:
    grounds = {}
    for device in DEVICES[:2]:
        browser.open(page, device)
        channels = browser.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        grounds[device.scheme] = sum(channels) / 3
    assert grounds["light"] > 200 > 60 > grounds["dark"]


def test_every_expert_has_its_cell(browser: Chromium, page: Path) -> None:
    browser.open(page, DEVICES[0])
    cells = {chart["title"]: chart["cells"] for chart in browser.evaluate(CHARTS)}
    assert cells["Error of every expert's weights"] == 4 * 6
    assert cells["Calibration tokens of every expert"] == 4 * 6


@pytest.mark.parametrize("device", [DEVICES[0], DEVICES[2]], ids=["desk", "phone"])
def test_flipped_problems_open_with_a_click_and_show_both_answers(
    device: Device, browser: Chromium, page: Path
) -> None:
    browser.open(page, device)
    first = "document.querySelector('details:has(.pair)')"
    assert browser.evaluate(f"{first}.open") is False
    assert browser.evaluate(f"{first}.querySelector('.pair').checkVisibility()") is False
    browser.evaluate(f"{first}.querySelector('summary').click()")
    assert browser.evaluate(f"{first}.querySelector('.pair').checkVisibility()") is True
    tops = browser.evaluate(f"[...{first}.querySelectorAll('.pair > div')].map((one) => one.offsetTop)")
    beside = tops[0] == tops[1]
    assert beside is not device.mobile, "side by side where there is room, else one below the other"
    assert "return 1" in browser.evaluate(f"{first}.querySelector('.pair').innerText")


@pytest.mark.parametrize("trusting", [False, True], ids=["policy", "escaping alone"])
def test_nothing_that_a_model_wrote_is_executed(
    trusting: bool, browser: Chromium, write: Write, tmp_path: Path
) -> None:
    """By the page's policy, and with that policy switched off by the escaping."""
    run = write()
    answers: JsonValue = [
        {
            "problem": HOSTILE,
            "prompt": HOSTILE,
            "reference": {"text": HOSTILE, "tokens": [1], "status": "pass"},
            "build": {"text": f"{HOSTILE} {HOSTILE}", "tokens": [2], "status": "fail"},
        }
    ]
    problems = run.tasks[1].model_copy(
        update={"name": HOSTILE, "files": {"answers": store_json(tmp_path / "run", answers)}}
    )
    build = run.build.model_copy(update={"name": HOSTILE, "path": HOSTILE})
    gates = (run.gates[0].model_copy(update={"sentence": HOSTILE, "name": HOSTILE}),)
    words: JsonValue = {"kld.mean": {"name": HOSTILE, "meaning": HOSTILE, "unit": HOSTILE}}
    tables: JsonValue = [{"title": HOSTILE, "columns": [HOSTILE], "rows": [[HOSTILE]], "note": HOSTILE}]
    text = run.tasks[0].model_copy(update={"details": {"words": words, "tables": tables}})
    snr: JsonValue = {f"model.layers.0.{HOSTILE}": 10.0, f"{HOSTILE}.experts.1.{HOSTILE}": 20.0}
    report = store_json(tmp_path / "run", {"layers": [{"snr_db": snr}]})
    changes = {"tasks": (text, problems), "gates": gates, "command": (HOSTILE,), "build_report": report}
    hostile = run.model_copy(update={"build": build, **changes})
    other = hostile.model_copy(update={"build": build.model_copy(update={"size": 2 * 10**7})})
    path = tmp_path / "hostile.html"
    with History.open(tmp_path / "history") as history:
        for day in (1, 2):
            history.add(tmp_path / "run", hostile.model_copy(update={"started": f"2026-01-0{day}"}))
        views = [view(tmp_path / "run", one, history) for one in (hostile, other)]
    path.write_text(html(views, absent=[(HOSTILE, HOSTILE)]))
    seen = browser.open(path, DEVICES[2], trusting=trusting)
    browser.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    assert browser.evaluate("typeof window.owned") == "undefined"
    assert browser.evaluate("document.querySelectorAll('script, img, iframe, link, base, [onload]').length") == 0
    links = browser.evaluate("[...document.querySelectorAll('a')].map((one) => one.getAttribute('href'))")
    assert all(re.fullmatch(r"#b\d+(g\d+)?", one) for one in links), links
    assert browser.evaluate(f"document.body.innerText.includes({json.dumps(HOSTILE)})"), "it is shown as text"
    assert browser.evaluate(OVERFLOWS) == []
    assert (seen.requests, seen.complaints) == ([path.as_uri()], [])


def test_a_page_that_does_not_escape_is_found_out(browser: Chromium, tmp_path: Path) -> None:
    path = tmp_path / "careless.html"
    path.write_text(f"<!doctype html><title>x</title><p>{HOSTILE}</p>")
    seen = browser.open(path, DEVICES[0])
    assert browser.evaluate("typeof window.owned") == "number"
    assert any("javascriptDialogOpening" in one for one in seen.complaints)
    assert len(seen.requests) > 1
