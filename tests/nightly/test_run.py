"""Nights: builds made and judged in order, continued where they stopped, remembered; the stack told from weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qconv.errors import ArtifactError, EngineError, OutputError, QconvError, UsageError
from qconv.evaluation.blaming import BLAME_NAME, blame_run
from qconv.evaluation.history import History
from qconv.evaluation.record import RUN_NAME, Verdict
from qconv.evaluation.report.page import html
from qconv.evaluation.report.view import view
from qconv.evaluation.run import evaluate
from qconv.folders.journal import WORK_FOLDER, locked
from qconv.folders.ownership import claim, own_folder
from qconv.nightly.run import BuildNight, Night, require_any_run, run_night
from qconv.nightly.settings import load_nightly
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
    folder, _ = next(iter(first.builds[0].runs.values()))
    claim(own_folder(folder / ".qconv") / "left").touch()  # as a kill right behind the record leaves it
    assert night(config, log=again).verdict == first.verdict
    assert not any("measuring" in line for line in again), "what is finished is not done again"
    assert not (folder / ".qconv").exists()
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
    monkeypatch.setattr("qconv.nightly.run.time.monotonic", lambda: float(next(clock)))
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

    monkeypatch.setattr("qconv.nightly.run.evaluate", shifted)
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


def test_a_stored_run_stands_only_for_what_was_measured(
    config: Path, rtn_build: Path, moe: Path, tmp_path: Path
) -> None:
    made = Path(shutil.copytree(rtn_build, tmp_path / "made"))
    suites = yaml.safe_load(config.read_text())["suites"][:1]
    rewrite(config, builds=[{"name": "one", "reference": str(moe), "build": "made"}], suites=suites)
    first = night(config)
    log: list[str] = []

    def said(word: str) -> bool:
        log.clear()
        night(config, log=log)
        return any(word in line for line in log)

    assert not said("measuring"), "nothing changed"
    gates, suite = yaml.safe_load((tmp_path / "gates.yaml").read_text()), yaml.safe_load(Path(suites[0]).read_text())
    (tmp_path / "gates.yaml").write_text(yaml.safe_dump(gates | {"alpha": 0.01}))
    assert said("changed since: what judges")
    Path(suites[0]).write_text(yaml.safe_dump(suite | {"seed": 1}))
    assert said("changed since: the suite")
    template = made / "chat_template.jinja"
    original = template.read_bytes()
    template.write_bytes(original + b" ")
    assert said("changed since: the build")
    template.write_bytes(original)
    assert said("changed since: the build")
    (made / "generation_config.json").write_text('{"top_k": 1}')  # in no hash but SHA256SUMS
    assert said("is not what it was")
    shard = sorted(made.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    log.clear()
    found = night(config, log=log)
    assert (first.verdict.outcome, found.verdict.outcome) == ("pass", "corrupt")
    assert any("changed since: the build" in line for line in log)
    assert not said("measuring"), "a corrupt build that stayed as it was is corrupt still"


def test_a_damaged_stored_run_is_corrupt_and_names_the_remedy(config: Path) -> None:
    values = yaml.safe_load(config.read_text())
    rewrite(config, builds=values["builds"][:1], suites=values["suites"][:1])
    folder, _ = next(iter(night(config).builds[0].runs.values()))
    record = (folder / RUN_NAME).read_bytes()
    (folder / RUN_NAME).write_bytes(record.replace(b'"tokens"', b'"broken"'))
    found = night(config)
    assert found.verdict.outcome == "corrupt"
    assert found.builds[0].problem is not None
    assert "run.json" in found.builds[0].problem.message
    assert str(folder) in str(found.builds[0].problem.hint)
    (folder / RUN_NAME).write_bytes(record)
    assert night(config).verdict.outcome == "pass"


def test_a_build_that_other_inputs_began_is_made_anew(config: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(config.read_text())
    build = values["builds"][1]
    rewrite(config, builds=[build], suites=values["suites"][:1])
    night(config)
    rewrite(config, builds=[build | {"recipe": RECIPE | {"grid": {"bits": 4, "group_size": 32}}}])
    log: list[str] = []
    found = night(config, log=log)
    assert any("quantizing anew" in line for line in log)
    ((_, run),) = found.builds[0].runs.values()
    assert run.build.quantized_bits_per_weight is not None
    assert run.build.quantized_bits_per_weight < 5.0  # four bits and a scale for every 32


def test_suites_of_one_stem_are_two(config: Path, moe: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(config.read_text())
    suite = yaml.safe_load((tmp_path / "cheap.yaml").read_text())
    for folder, seed in (("one", 0), ("other", 1)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.yaml").write_text(yaml.safe_dump(suite | {"seed": seed}))
    rewrite(config, builds=values["builds"][:1], suites=["one/same.yaml", "other/same.yaml"])
    runs = night(config).builds[0].runs
    assert {name: run.seed for name, (_, run) in runs.items()} == {"one/same.yaml": 0, "other/same.yaml": 1}
    assert len({folder for folder, _ in runs.values()}) == 2
    rewrite(config, suites=["one/same.yaml", "other/../one/same.yaml"])
    with pytest.raises(UsageError, match="twice"):
        load_nightly(config)


def test_paths_are_relative_to_the_file(
    config: Path, moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = yaml.safe_load(config.read_text())
    suite = yaml.safe_load((tmp_path / "cheap.yaml").read_text())
    (tmp_path / "cheap.yaml").write_text(yaml.safe_dump(suite | {"gates": "gates.yaml"}))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(RECIPE))
    (tmp_path / "model").symlink_to(moe)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "model").mkdir(parents=True)
    for name in ("cheap.yaml", "gates.yaml", "mine.yaml", "smoke", "awq"):
        (elsewhere / name).write_text("wrong: [")
    (tmp_path / "awq").mkdir()  # neither is a folder beside the file the packaged recipe of its name
    (tmp_path / "smoke").mkdir()
    monkeypatch.chdir(elsewhere)
    builds = [
        {"name": "made", "reference": "model", "recipe": "mine.yaml"},
        {"name": "packaged", "reference": "owner/model", "recipe": "awq"},
        {"name": "absent", "reference": "model", "build": "nowhere"},
    ]
    rewrite(config, suites=["cheap.yaml", "smoke"], builds=builds)
    plan = load_nightly(config)
    assert [suite.source for suite in plan.suites] == [str(tmp_path / "cheap.yaml"), "smoke"]
    assert [suite.gates for suite in plan.suites] == [str(tmp_path / "gates.yaml"), "default"]
    assert [build.reference for build in plan.builds] == [
        str(tmp_path / "model"),
        "owner/model",
        str(tmp_path / "model"),
    ]
    assert plan.builds[2].build == str(tmp_path / "nowhere")
    assert (plan.work, plan.history) == (tmp_path / values["work"], tmp_path / values["history"])


@pytest.mark.parametrize(("problem", "code"), [({"build": "nowhere"}, 2), ({"build": "empty"}, 5)])
def test_a_night_of_nothing_names_the_builds_own_problem(
    config: Path, moe: Path, tmp_path: Path, problem: dict[str, str], code: int
) -> None:
    (tmp_path / "empty").mkdir()
    rewrite(config, builds=[{"name": "gone", "reference": str(moe), **problem}])
    with pytest.raises(EngineError, match=f"gone: .*{problem['build']}") as caught:
        require_any_run(night(config))
    assert caught.value.exit_code == code


def test_causes_that_differ_are_a_failure_and_a_corrupt_one_is_corrupt(tmp_path: Path) -> None:
    def code(*problems: QconvError) -> int:
        nights = tuple(BuildNight(str(number), problem=one) for number, one in enumerate(problems))
        with pytest.raises(EngineError) as caught:
            require_any_run(Night(tmp_path, nights, Verdict(outcome="inconclusive", sentence="")))
        return caught.value.exit_code

    assert code(UsageError("a"), UsageError("b")) == 2
    assert code(UsageError("a"), OutputError("b")) == 1
    assert code(UsageError("a"), ArtifactError("b")) == 5


def test_a_budget_spent_on_making_builds_is_inconclusive_and_no_error(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(config, budget_minutes=10.0)
    clock = iter(range(0, 10**7, 1000))  # more than the budget passes at every look
    monkeypatch.setattr("qconv.nightly.run.time.monotonic", lambda: float(next(clock)))
    found = night(config)
    require_any_run(found)
    assert found.verdict.outcome == "inconclusive"
    assert not any(build.runs for build in found.builds)


def test_two_nights_of_one_work_folder_are_not_run_at_once(config: Path, tmp_path: Path) -> None:
    (tmp_path / "nights").mkdir()
    with locked(tmp_path / "nights"), pytest.raises(OutputError, match="another qconv process"):
        night(config, "2026-01-02")
    assert list((tmp_path / "nights").iterdir()) == []


@pytest.mark.parametrize("name", ["nights", "history"])
def test_a_work_folder_or_history_that_is_a_file_is_named(config: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match=name):
        night(config)
    assert (tmp_path / name).read_text() == "mine"


BUILD = {"name": "a", "reference": "m", "build": "x"}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"suites": []}, "suites"),
        ({"suites": ["a\x00b"]}, "suites"),
        ({"suites": ["absent.yaml"]}, "absent"),
        ({"suites": ["wrong-task.yaml"]}, "name"),
        ({"suites": ["wrong-gates.yaml"]}, "nowhere"),
        ({"wrong": 1}, "wrong: unknown key"),
        ({"work": ""}, "work"),
        ({"work": "a\x00b"}, "work"),
        ({"work": ["a"]}, "work"),
        ({"history": 5}, "history"),
        ({"builds": [{"name": "a", "reference": "m"}]}, "either a recipe or a build"),
        *(
            ({"builds": [BUILD | {"name": name}]}, "name")
            for name in ("a/b", "..", ".", "/a", "a\n", "a\x00", "", "report.html", "JUNIT.xml", "a" * 300)
        ),
        ({"builds": [BUILD] * 2}, "a name of its own"),
        ({"builds": [BUILD, BUILD | {"name": "A"}]}, "a name of its own"),
        ({"builds": [BUILD | {"canary": "yes"}]}, "canary"),
        ({"builds": [BUILD | {"reference": "a\x07"}]}, "reference"),
        ({"builds": [{"name": "a", "reference": "m", "recipe": "absent.yaml"}]}, "absent"),
        ({"builds": [{"name": "a", "reference": "m", "recipe": {"wrong": 1}}]}, "wrong"),
        ({"builds": [{"name": "a", "reference": "m", "recipe": "gguf:NONE"}]}, "NONE"),
        *(
            ({"budget_minutes": value}, "budget_minutes")
            for value in (0, -1, True, "ten", float("nan"), float("inf"), 10**400)
        ),
        *(({"keep_nights": value}, "keep_nights") for value in (0, -1, True, 1.5, 10**30, float("inf"))),
        *(({"engine": value}, "engine") for value in ("warp", "", "openai:", 7)),
    ],
)
def test_a_wrong_configuration_names_its_key_before_anything_is_written(
    config: Path, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    suite = yaml.safe_load((tmp_path / "cheap.yaml").read_text())
    (tmp_path / "wrong-gates.yaml").write_text(yaml.safe_dump(suite | {"gates": "nowhere.yaml"}))
    tasks = [{"kind": "text", "name": "../../out"}]
    (tmp_path / "wrong-task.yaml").write_text(yaml.safe_dump(suite | {"tasks": tasks}))
    rewrite(config, **changes)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=match):
        night(config)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_packaged_configuration_is_well_formed() -> None:
    plan = load_nightly(Path(__file__).resolve().parents[2] / "evals/nightly.yaml")
    assert all(Path(build.reference).is_dir() for build in plan.builds)
