"""Reports of runs whose files somebody damaged or wrote: an error that names the file, and nothing that acts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from qconv.errors import ArtifactError
from qconv.evaluation.blaming import BLAME_NAME
from qconv.evaluation.build_report import parse_report
from qconv.evaluation.kept_files import store_arrays, store_json
from qconv.evaluation.record import Metric, Run
from qconv.evaluation.report.charts import Scale, TrendPoint, histogram, trend
from qconv.evaluation.report.experts import expert_maps
from qconv.evaluation.report.page import html, junit, markdown
from qconv.evaluation.report.view import view
from tests.evaluation.report.conftest import Write

SIDE = {"status": "pass", "text": "a", "tokens": [1]}
ANSWER = {"problem": "p", "prompt": "q", "build": SIDE, "reference": SIDE | {"status": "fail"}}
COST = {"part": "model.layers.0", "layer": 0, "kld": 0.1, "error": 0.01}
BLAME = {"tokens": 64, "whole": COST, "layers": [COST], "parts": [COST], "baseline": None}


def with_task(run: Run, index: int, **changes: object) -> Run:
    tasks = list(run.tasks)
    tasks[index] = tasks[index].model_copy(update=changes)
    return run.model_copy(update={"tasks": tuple(tasks)})


@pytest.mark.parametrize(
    "answers",
    [
        5,
        {"a": 1},
        [5],
        [{"problem": "p"}],
        [ANSWER | {"build": "pass"}],
        [ANSWER | {"build": {"status": "pass"}}],
        [ANSWER | {"build": SIDE | {"text": 5}}],
        [ANSWER | {"build": SIDE | {"tokens": [1 << 70]}}],  # more than an array of 64 bits holds
        [ANSWER | {"build": SIDE | {"tokens": "abc"}}],
        [ANSWER | {"prompt": None}],
    ],
)
def test_answers_that_are_none_are_named(tmp_path: Path, write: Write, answers: Any) -> None:
    run = write()
    file = store_json(tmp_path / "run", answers)
    with pytest.raises(ArtifactError, match=file.name) as caught:
        view(tmp_path / "run", with_task(run, 1, files={"answers": file}))
    assert caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "5",
        "[" * 10**4,
        json.dumps(BLAME | {"whole": 5}),
        json.dumps(BLAME | {"layers": {"a": 1}}),
        json.dumps(BLAME | {"parts": [COST | {"kld": "dear"}]}),
        json.dumps(BLAME | {"baseline": 5}),
    ],
)
def test_blame_that_is_none_is_named(tmp_path: Path, write: Write, text: str) -> None:
    run = write()
    (tmp_path / "run" / BLAME_NAME).write_text(text)
    with pytest.raises(ArtifactError, match=r"blame\.json"):
        view(tmp_path / "run", run)
    (tmp_path / "run" / BLAME_NAME).write_text(json.dumps(BLAME))
    assert view(tmp_path / "run", run).blame[0][0] == "the whole build"


@pytest.mark.parametrize("rows", [5, "rows", [5], [{}], [{"from": "a", "to": 1, "tokens": 1}]])
def test_confidences_that_are_none_are_named(tmp_path: Path, write: Write, rows: Any) -> None:
    run = with_task(write(), 0, details={"by_confidence": rows})
    with pytest.raises(ArtifactError, match="by_confidence"):
        view(tmp_path / "run", run)


@pytest.mark.parametrize("arrays", [{"other": np.zeros(3, np.float32)}, {"kl": np.zeros(3, np.int64)}])
def test_arrays_without_divergence_are_named(tmp_path: Path, write: Write, arrays: Any) -> None:
    run = write()
    file = store_arrays(tmp_path / "run", arrays)
    with pytest.raises(ArtifactError, match=file.name):
        view(tmp_path / "run", with_task(run, 0, files={"tokens": file}))


def test_a_kept_report_that_is_none_is_named(tmp_path: Path, write: Write) -> None:
    run = write()
    file = store_json(tmp_path / "run", {"layers": 5})
    with pytest.raises(ArtifactError, match=f"{file.name}.*layers"):
        view(tmp_path / "run", run.model_copy(update={"build_report": file}))


def test_a_report_that_names_one_expert_far_away_has_no_map() -> None:
    layer = {"snr_db": {"a.experts.999999999.up_proj": 10.0}}  # a row of as many cells takes 8 GB
    assert expert_maps(parse_report({"layers": [layer]}, "report")) is None


def test_a_module_of_rubbish_has_a_place_on_the_map() -> None:
    layer = {"snr_db": {"a.experts.0.up_proj": -1e9}, "experts": [{"module": "a.experts.0", "tokens": 10**30}]}
    maps = expert_maps(parse_report({"layers": [layer]}, "report"))
    assert maps is not None
    assert maps.error is not None
    assert np.isfinite(maps.error).all()
    assert maps.tokens is not None


def test_charts_take_any_number() -> None:
    points = [TrendPoint("a", value, -1.7e308, 1.7e308, False) for value in (1.7e308, float("nan"), -1e308, 1.0)]
    for made in (
        trend(points, 1e308, unit=""),
        histogram(np.array([5e-324, 0.0]), [("mean", float("nan"))], unit=""),
    ):
        ElementTree.fromstring(made)
    assert Scale(-1.7e308, 1.7e308, 0.0, 1.0).ticks() == [-1.7e308]


def test_names_that_would_act_are_text_in_every_form(tmp_path: Path, write: Write) -> None:
    name = "# [x](http://e) <u>\x1b[2J\u202e|`"
    run = write()
    run = run.model_copy(
        update={
            "build": run.build.model_copy(update={"name": name}),
            "command": ("qconv", "a\n```\n# b"),
            "gates": tuple(gate.model_copy(update={"name": name, "sentence": name}) for gate in run.gates),
        }
    )
    renamed = with_task(run, 0, name=name, source=name, metrics={name: Metric(value=1.0)}, files={})
    shown = view(tmp_path / "run", renamed)
    page, text, cases = html([shown]), markdown([shown]), junit([shown])
    for made in (page, text, cases):
        assert not {"\x1b", "\u202e"} & set(made)
    assert "<u>" not in page
    assert "\n# b" not in text
    assert "[x](http" not in text
    assert "<u>" not in text.replace("\\<", "")
    assert all("\n#" not in line for line in text.splitlines())
    ElementTree.fromstring(cases)
