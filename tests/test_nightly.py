"""Nights: builds made and judged in order, continued where they stopped, remembered; the stack told from weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qconv.errors import UsageError
from qconv.evaluation.blaming import BLAME_NAME, blame_run
from qconv.evaluation.history import History
from qconv.evaluation.report.page import html
from qconv.evaluation.report.view import view
from qconv.evaluation.run import evaluate
from qconv.manifest import WORK_FOLDER
from qconv.nightly import Night, load_nightly, run_night
from tests.evaluation.test_blame import change
from tests.evaluation.test_run import corpus, suite_on  # noqa: F401 - a fixture

RECIPE = {"format": "w4a16", "method": "rtn", "grid": {"bits": 8, "group_size": 32}}


@pytest.fixture
def config(tmp_path: Path, moe: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """A configuration of two suites and two builds, one of them a canary."""
    monkeypatch.setenv("QCONV_CACHE", str(tmp_path / "cache"))
    # Rounding costs a random model more than a trained one, so only what is not quantized has a narrow limit.
    classes = [
        {"name": "unquantized", "bits": [15.0, 40.0], "reference": {"kld.mean": 0.0005}},
        {"name": "quantized", "bits": [1.0, 15.0], "reference": {"kld.mean": 5.0}, "baseline": {"kld.mean": 0.1}},
    ]
    (tmp_path / "gates.yaml").write_text(yaml.safe_dump({"classes": classes}))
    cheap = suite_on(corpus, noise=None, gates=str(tmp_path / "gates.yaml")).model_dump(mode="json")
    (tmp_path / "cheap.yaml").write_text(yaml.safe_dump(cheap | {"tasks": cheap["tasks"][:1]}))
    (tmp_path / "dear.yaml").write_text(yaml.safe_dump(cheap))
    values = {
        "work": "nights",
        "history": "history",
        "suites": [str(tmp_path / "cheap.yaml"), str(tmp_path / "dear.yaml")],
        "builds": [
            {"name": "canary", "reference": str(moe), "build": str(moe), "canary": True},
            {"name": "eight", "reference": str(moe), "recipe": RECIPE},
        ],
    }
    path = tmp_path / "nightly.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def rewrite(config: Path, **changes: Any) -> None:
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | changes))


def night(config: Path, date: str = "2026-01-01", log: list[str] | None = None) -> Night:
    said = [] if log is None else log
    return run_night(load_nightly(config), date, progress=lambda *_: None, log=said.append)


def test_a_night_is_made_measured_judged_and_remembered(config: Path, tmp_path: Path) -> None:
    first = night(config)
    assert first.verdict.outcome == "pass", first.verdict.sentence
    assert first.verdict.sentence == "no regression in any build; the canary did not move"
    assert [list(build.runs) for build in first.builds] == [
        [str(tmp_path / f"{one}.yaml") for one in ("cheap", "dear")]
    ] * 2
    again: list[str] = []
    assert night(config, log=again).verdict == first.verdict
    assert not any("measuring" in line for line in again), "what is finished is not done again"
    second = night(config, "2026-01-02")
    with History.open(tmp_path / "history") as history:
        runs = history.runs(name="eight")
        assert len(runs) == 4
        latest = second.builds[1].runs[str(tmp_path / "dear.yaml")][1]
        assert latest.baseline is not None, "the night before is the baseline"
        assert any(gate.against == "baseline" for gate in latest.gates)
        folder = second.folder / "eight" / "run-dear"
        assert "the last 2 runs" in html([view(folder, latest, history, "eight")])


def test_a_failing_build_is_not_measured_on_dearer_suites(config: Path, moe: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(moe, tmp_path / "broken"))
    change(broken, "model.layers.0.mlp.experts.3.down_proj.weight", torch.zeros_like)
    builds = [{"name": "broken", "reference": str(moe), "build": str(broken)}]
    rewrite(config, builds=builds)
    log: list[str] = []
    found = night(config, log=log)
    (build,) = found.builds
    assert build.outcome == found.verdict.outcome == "regression"
    assert build.skipped == {str(tmp_path / "dear.yaml"): f"it failed {tmp_path / 'cheap.yaml'}"}
    folder, run = build.runs[str(tmp_path / "cheap.yaml")]
    blamed = blame_run(folder, tokens=200, worst_layers=1, progress=lambda *_: None, log=log.append)
    assert blamed.layers[0].part.name == "model.layers.0"
    assert blamed.parts[0].part.name == "model.layers.0.mlp.experts.3"
    assert all(one.kld == 0.0 for one in blamed.layers[1:]), "nothing else is not the reference's"
    assert (folder / BLAME_NAME).exists()
    assert not (folder / WORK_FOLDER).exists(), "activations are gone"
    assert "What costs most, alone in the reference" in html([view(folder, run)])


def test_a_spent_budget_is_inconclusive(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(config, budget_minutes=10.0)
    clock = iter(range(0, 10**6, 240))  # four minutes pass at every look
    monkeypatch.setattr("qconv.nightly.time.monotonic", lambda: float(next(clock)))
    found = night(config)
    assert found.verdict.outcome == "inconclusive"
    assert any("budget" in reason for build in found.builds for reason in build.skipped.values())


def test_a_build_that_cannot_be_made_leaves_the_others(config: Path, moe: Path) -> None:
    values = yaml.safe_load(config.read_text())
    bad = {"name": "bad", "reference": str(moe), "recipe": RECIPE | {"grid": {"group_size": 48}}}
    rewrite(config, builds=[bad, *values["builds"]], suites=values["suites"][:1])
    found = night(config)
    assert found.builds[0].problem is not None
    assert "48" in str(found.builds[0].problem)
    assert [build.outcome for build in found.builds] == ["inconclusive", "pass", "pass"]
    assert found.verdict.outcome == "inconclusive"


def test_a_canary_that_moves_tells_of_the_stack(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = yaml.safe_load(config.read_text())
    rewrite(config, builds=values["builds"][:1], suites=values["suites"][:1])
    night(config)

    def shifted(*args: Any, **options: Any) -> Any:
        run = evaluate(*args, **options)
        task = run.tasks[0]
        metric = task.metrics["ppl"].model_copy(update={"value": 1.0})
        moved = task.model_copy(update={"metrics": {**task.metrics, "ppl": metric}})
        return run.model_copy(update={"tasks": (moved,), "versions": {**run.versions, "torch": "next"}})

    monkeypatch.setattr("qconv.nightly.evaluate", shifted)
    found = night(config, "2026-01-02")
    assert "the canary canary moved, so the stack has changed: versions: torch" in found.verdict.sentence


def test_old_nights_are_removed_and_remembered(config: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(config.read_text())
    rewrite(config, builds=values["builds"][:1], suites=values["suites"][:1], keep_nights=1)
    for day in (1, 2):
        night(config, f"2026-01-0{day}")
    assert [path.name for path in (tmp_path / "nights").iterdir()] == ["2026-01-02"]
    with History.open(tmp_path / "history") as history:
        assert len(history.runs()) == 2


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"suites": []}, "suites"),
        ({"wrong": 1}, "wrong: unknown key"),
        ({"builds": [{"name": "a", "reference": "m"}]}, "either a recipe or a build"),
        ({"builds": [{"name": "a/b", "reference": "m", "build": "x"}]}, "name"),
        ({"builds": [{"name": "a", "reference": "m", "build": "x"}] * 2}, "a name of its own"),
        ({"budget_minutes": 0}, "budget_minutes"),
    ],
)
def test_a_wrong_configuration_names_its_key(config: Path, changes: dict[str, Any], match: str) -> None:
    rewrite(config, **changes)
    with pytest.raises(UsageError, match=match):
        load_nightly(config)


def test_the_packaged_configuration_is_well_formed() -> None:
    settings = load_nightly(Path(__file__).resolve().parents[1] / "evals/nightly.yaml")
    assert all(Path(build.reference).is_dir() for build in settings.builds)
