"""Whole runs on a small random model: what is measured, resumed, refused, and found worse."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qconv.errors import ArtifactError, Interrupted, OutputError, StaleJournalError, UsageError
from qconv.evaluation.artifacts import identify
from qconv.evaluation.cache import Cache
from qconv.evaluation.compare import compare
from qconv.evaluation.kept_files import load_arrays
from qconv.evaluation.record import Run, read_run
from qconv.evaluation.run import TASK_NAME, Request, evaluate
from qconv.evaluation.standing import measured_before
from qconv.evaluation.suites import Suite, load_suite, packaged_names
from qconv.evaluation.tasks import settings_of
from qconv.folders.journal import WORK_FOLDER
from qconv.planning.recipe import load_recipe
from qconv.runtime.loading import load
from tests.conftest import build, folder_bytes, small_recipe

Evaluate = Callable[..., Run]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty small documents."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    words = ["def", "return", "self", "import", "x", "(a, b)", "=", "0\n", "class", "for", "in", "range", ":\n    "]
    for index in range(30):
        (folder / f"{index:02}.py").write_text(" ".join(generator.choice(words, 160)))
    return folder


def suite_on(corpus: Path, **changes: Any) -> Suite:
    text = {"kind": "text", "name": "text", "corpus": f"text:{corpus}", "context": 64, "stride": 32, "tokens": 1200}
    stream = {**text, "name": "stream", "rule": "llama.cpp", "tokens": 400}
    values = {"engine": {"rows": 4}, "noise": {"tokens": 100}, "tasks": [text, stream], **changes}
    return Suite.model_validate(values)


@pytest.fixture
def run(moe: Path, corpus: Path, tmp_path: Path) -> Evaluate:
    """Evaluates a path; the cache is shared within a test."""
    count = 0

    def go(path: Path, **changes: Any) -> Run:
        nonlocal count
        count += 1
        options: dict[str, Any] = {
            name: changes.pop(name) for name in ("restart", "progress", "log") if name in changes
        }
        values: dict[str, Any] = {
            "build": path,
            "reference": moe,
            "suite": suite_on(corpus),
            "suite_name": "small",
            "out": tmp_path / f"run-{count}",
            "cache": Cache(tmp_path / "cache"),
        }
        options = {"progress": lambda *_: None, "log": lambda _: None, **options}
        return evaluate(Request(**values | changes), **options)

    return go


def test_numbers_are_those_of_the_definition(rtn_build: Path, moe: Path, run: Evaluate, tmp_path: Path) -> None:
    """Perplexity and divergence worked out in float64 from logits of single windows."""
    result = run(rtn_build, gates=None)
    task = result.tasks[0]
    arrays = load_arrays(tmp_path / "run-1", task.files["tokens"])
    models = [load(path, dtype=torch.float32, device="cpu") for path in (moe, rtn_build)]
    from qconv.evaluation.suites import TextSettings
    from qconv.evaluation.text import windowed_text

    text = windowed_text(TextSettings.model_validate(task.settings), moe, seed=0)
    nll, kl, flips = [], [], []
    with torch.inference_mode():
        for window in text.windows:
            ids = torch.tensor(window.ids.tolist())[None]
            p, q = (torch.log_softmax(model(ids).logits[0].double(), -1)[window.first - 1 : -1] for model in models)
            nll += (-q[torch.arange(len(q)), ids[0, window.first :]]).tolist()
            kl += (p.exp() * (p - q)).sum(-1).tolist()
            flips += (p.argmax(-1) != q.argmax(-1)).tolist()
    metrics = task.metrics
    assert metrics["ppl"].value == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)
    assert metrics["kld.mean"].value == pytest.approx(np.mean(kl), rel=1e-3)
    assert metrics["kld.max"].value == pytest.approx(np.max(kl), rel=1e-3)
    assert metrics["top1.flips"].value == pytest.approx(np.mean(flips), abs=2 / len(flips))
    assert np.mean(kl) > 1e-4
    assert arrays["kl"].shape == (len(kl),)
    nbytes = sum(int(window.nbytes.sum()) for window in text.windows)
    assert metrics["bits_per_byte"].value == pytest.approx(np.sum(nll) / np.log(2) / nbytes, rel=1e-5)
    assert sum(item.values["tokens"] for item in task.items) == len(kl)


def test_a_build_for_engines_that_round_inputs_is_measured_with_that_too(
    rtn_build: Path, moe: Path, run: Evaluate, tmp_path: Path
) -> None:
    out = tmp_path / "fp8"
    build(moe, out, load_recipe("fp8-dynamic"))
    plain = run(out, gates=None).tasks[0].metrics
    exact, rounded_kl = plain["kld.mean"].value, plain["rounded_inputs.kld.mean"].value
    assert exact is not None
    assert rounded_kl is not None
    assert rounded_kl > 1.05 * exact > 0.0
    # By the definition, as above, the model rounding inputs.
    from qconv.evaluation.suites import TextSettings
    from qconv.evaluation.text import windowed_text

    text = windowed_text(TextSettings.model_validate(run(out, gates=None).tasks[0].settings), moe, seed=0)
    reference = load(moe, dtype=torch.float32, device="cpu")
    rounded = load(out, dtype=torch.float32, device="cpu", round_inputs=True)
    kl: list[float] = []
    with torch.inference_mode():
        for window in text.windows:
            ids = torch.tensor(window.ids.tolist())[None]
            p, q = (
                torch.log_softmax(model(ids).logits[0].double(), -1)[window.first - 1 : -1]
                for model in (reference, rounded)
            )
            kl += (p.exp() * (p - q)).sum(-1).tolist()
    assert plain["rounded_inputs.kld.mean"].value == pytest.approx(np.mean(kl), rel=0.02)
    streamed = run(out, gates=None, engine="stream").tasks[0].metrics
    assert streamed["rounded_inputs.kld.mean"].value == pytest.approx(np.mean(kl), rel=0.02)
    alone = run(out, gates=None, reference=None).tasks[0].metrics
    assert set(alone) == {"ppl", "bits_per_byte", "rounded_inputs.ppl"}
    assert not [name for name in run(rtn_build, gates=None).tasks[0].metrics if name.startswith("rounded")]


def test_a_build_that_is_the_reference_passes_with_nothing_to_show(moe: Path, run: Evaluate) -> None:
    result = run(moe, gates="default")
    assert result.verdict.outcome == "pass"
    assert result.tasks[0].metrics["kld.mean"].value == 0.0
    assert result.tasks[0].metrics["ppl.ratio"].value == 1.0


def test_the_reference_is_computed_once(rtn_build: Path, awq_build: Path, run: Evaluate, tmp_path: Path) -> None:
    seen: list[str] = []
    first = run(rtn_build, progress=lambda what, done, total: seen.append(what))
    parts = {file: file.stat().st_ino for file in (tmp_path / "cache").rglob("*") if file.is_file()}
    assert any(file.name.startswith("part-") for file in parts)
    second = run(awq_build)
    assert {file: file.stat().st_ino for file in (tmp_path / "cache").rglob("*") if file.is_file()} == parts
    assert first.tasks[0].inputs_sha256 == second.tasks[0].inputs_sha256


def test_the_same_run_twice_is_the_same_to_the_bit(rtn_build: Path, run: Evaluate) -> None:
    assert run(rtn_build, gates="default").digest == run(rtn_build, gates="default").digest


def test_an_interrupted_run_continues_and_ends_the_same(
    rtn_build: Path, run: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qconv.evaluation.reference.PART_BYTES", 1 << 18)
    whole = run(rtn_build)
    for stop in (2, 5):
        steps = 0

        def interrupt(what: str, done: int, total: int, stop: int = stop) -> None:
            nonlocal steps
            steps += what == "build"
            if steps == stop:
                raise Interrupted(2)

        out = tmp_path / f"interrupted-{stop}"
        with pytest.raises(Interrupted):
            run(rtn_build, out=out, progress=interrupt)
        with pytest.raises(ArtifactError, match=r"run\.json"):
            read_run(out)
        assert run(rtn_build, out=out).digest == whole.digest
        assert not (out / ".qconv").exists()


def test_a_damaged_task_of_an_interrupted_run_is_named(rtn_build: Path, run: Evaluate, tmp_path: Path) -> None:
    steps = 0

    def interrupt(what: str, done: int, total: int) -> None:
        nonlocal steps
        steps += what == "build" and done == 0
        if steps == 2:  # the second task has begun
            raise Interrupted(2)

    with pytest.raises(Interrupted):
        run(rtn_build, out=tmp_path / "out", progress=interrupt)
    kept = tmp_path / "out" / WORK_FOLDER / "task-text" / TASK_NAME
    values = json.loads(kept.read_text())
    del values["items"][0]["values"]["tokens"]
    kept.write_text(json.dumps(values))
    # Somebody who changes it on purpose changes its checksum too; else it would be measured again.
    kept.with_name(f"{TASK_NAME}.sha256").write_text(hashlib.sha256(kept.read_bytes()).hexdigest())
    with pytest.raises(ArtifactError, match=r"task\.json.*tokens") as caught:
        run(rtn_build, out=tmp_path / "out")
    assert str(kept) in str(caught.value.hint)
    kept.unlink()
    assert run(rtn_build, out=tmp_path / "out").digest == run(rtn_build).digest


def test_another_suite_in_the_same_folder_is_stale(
    rtn_build: Path, corpus: Path, run: Evaluate, tmp_path: Path
) -> None:
    def interrupt(*_: object) -> None:
        raise Interrupted(2)

    with pytest.raises(Interrupted):
        run(rtn_build, out=tmp_path / "out", progress=interrupt)
    with pytest.raises(StaleJournalError, match="suite"):
        run(rtn_build, out=tmp_path / "out", suite=suite_on(corpus, seed=1))
    run(rtn_build, out=tmp_path / "out", suite=suite_on(corpus, seed=1), restart=True)


def test_a_restart_that_cannot_begin_leaves_the_run(rtn_build: Path, run: Evaluate, tmp_path: Path) -> None:
    run(rtn_build, out=tmp_path / "out")
    before = folder_bytes(tmp_path / "out")
    with pytest.raises(UsageError, match="absent"):
        run(rtn_build, out=tmp_path / "out", suite=suite_on(tmp_path / "absent"), restart=True)
    assert folder_bytes(tmp_path / "out") == before
    with pytest.raises(UsageError):
        run(rtn_build, out=tmp_path / "out", gates="absent.yaml", restart=True)
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(OutputError, match=r"notes\.txt.*nothing was removed"):
        run(rtn_build, out=tmp_path / "out", restart=True)
    (tmp_path / "out" / "notes.txt").unlink()
    assert folder_bytes(tmp_path / "out") == before


def test_a_foreign_folder_and_a_finished_run_are_left_alone(rtn_build: Path, run: Evaluate, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    with pytest.raises(OutputError, match="something else"):
        run(rtn_build, out=tmp_path / "foreign", restart=True)
    assert (tmp_path / "foreign" / "thesis.tex").exists()
    run(rtn_build, out=tmp_path / "out")
    with pytest.raises(OutputError, match="finished"):
        run(rtn_build, out=tmp_path / "out")


@pytest.mark.parametrize("left", ["everything", "the ledger alone"])
def test_killed_after_its_record_a_run_goes_on(
    left: str,
    rtn_build: Path,
    moe: Path,
    corpus: Path,
    run: Evaluate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def pull(work: Path) -> None:
        for name in ("key.json", "key.json.partial") if left == "the ledger alone" else ():
            (work / name).unlink(missing_ok=True)
        raise Interrupted(9)

    with monkeypatch.context() as patch:
        patch.setattr("qconv.evaluation.run.remove_claimed", pull)
        with pytest.raises(Interrupted):
            run(rtn_build, out=tmp_path / "out")
    whole = read_run(tmp_path / "out")
    with pytest.raises((OutputError, StaleJournalError)):
        run(rtn_build, out=tmp_path / "out", suite=suite_on(corpus, seed=1))
    assert read_run(tmp_path / "out") == whole
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    assert run(rtn_build, out=tmp_path / "out").digest == whole.digest
    asked = Request(rtn_build, moe, suite_on(corpus), "small", tmp_path / "copy", Cache(tmp_path / "cache"))
    assert measured_before(asked, lambda *_: None) == whole
    for out in (tmp_path / "out", tmp_path / "copy"):
        assert not (out / ".qconv").exists()
    with pytest.raises(OutputError, match="finished"):
        run(rtn_build, out=tmp_path / "out")


def test_a_corrupt_build_is_not_even_measured(rtn_build: Path, run: Evaluate, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(rtn_build, tmp_path / "copy"))
    shard = sorted(copy.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    result = run(copy, gates="default")
    assert (result.verdict.outcome, result.verdict.exit_code, result.tasks) == ("corrupt", 5, ())
    assert "sha256" in result.verdict.sentence


def test_a_worse_build_fails_against_the_baseline(moe: Path, corpus: Path, run: Evaluate, tmp_path: Path) -> None:
    """Three bits less than the baseline's eight."""
    eight = build(moe, tmp_path / "eight", small_recipe(grid={"bits": 8, "group_size": 32})).out
    gates = tmp_path / "gates.yaml"
    gates.write_text("classes: [{name: any, bits: [1, 40], baseline: {kld.mean: 0.1}}]")
    baseline = run(eight, gates=str(gates))
    assert baseline.verdict.exit_code == 0
    four = build(moe, tmp_path / "four", small_recipe()).out
    result = run(four, gates=str(gates), baseline=baseline)
    assert (result.verdict.outcome, result.verdict.exit_code) == ("regression", 3)
    assert {gate.reruns for gate in result.gates if gate.status == "fail"} == {1}
    assert result.baseline == baseline.digest
    again = run(eight, gates=str(gates), baseline=baseline)
    assert again.verdict.exit_code == 0


def test_without_a_reference_only_perplexity_is_measured(rtn_build: Path, run: Evaluate) -> None:
    result = run(rtn_build, reference=None)
    alone, beside = result.tasks[0].metrics, run(rtn_build).tasks[0].metrics
    assert set(alone) == {"ppl", "bits_per_byte"}
    assert alone["ppl"].value == pytest.approx(beside["ppl"].value, rel=1e-6)


def test_top_k_of_the_reference_brackets_the_whole(
    rtn_build: Path, run: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(rtn_build).tasks[0].metrics
    monkeypatch.setattr("qconv.evaluation.reference.WHOLE_BYTES", 0)
    bounds = run(rtn_build).tasks[0].metrics
    assert bounds["kld.mean"].value is not None
    assert whole["kld.mean"].value is not None
    assert bounds["kld.upper"].value is not None
    assert bounds["kld.mean"].value < whole["kld.mean"].value < bounds["kld.upper"].value
    assert bounds["top1.flips"] == whole["top1.flips"]
    assert bounds["ppl"] == whole["ppl"]


def test_comparison_pairs_units_and_finds_the_better_build(moe: Path, run: Evaluate, tmp_path: Path) -> None:
    eight = build(moe, tmp_path / "eight", small_recipe(grid={"bits": 8, "group_size": 32})).out
    first, second = run(eight), run(build(moe, tmp_path / "four", small_recipe()).out)
    found = {(one.task, one.metric): one for one in compare(first, second)}
    kld = found["text", "kld.mean"]
    assert kld.word == "worse"
    assert 0 < kld.low < kld.value < kld.high
    assert kld.second - kld.first == pytest.approx(kld.value)
    assert {one.word for one in compare(first, first)} == {"not distinguishable"}


def test_runs_without_common_units_are_not_compared(moe: Path, corpus: Path, run: Evaluate) -> None:
    shared = suite_on(corpus)
    only = [suite_on(corpus, tasks=[task]) for task in shared.tasks]
    with pytest.raises(UsageError, match="share no"):
        compare(run(moe, suite=only[0]), run(moe, suite=only[1]))


def test_identity_is_of_content_not_of_place(rtn_build: Path, tmp_path: Path, edit_json: Callable[..., None]) -> None:
    copy = Path(shutil.copytree(rtn_build, tmp_path / "copy"))
    assert identify(copy).sha256 == identify(rtn_build).sha256
    assert identify(copy).kind == "build"
    assert identify(copy).format == "w4a16"
    edit_json(copy / "config.json", rms_norm_eps=1e-5)
    assert identify(copy).sha256 != identify(rtn_build).sha256
    before = identify(copy).tokenizer_sha256
    (copy / "chat_template.jinja").write_text("other")
    assert identify(copy).tokenizer_sha256 != before


def test_packaged_suites_are_well_formed() -> None:
    assert {"smoke", "nightly", "release"} <= set(packaged_names("suites"))
    for name in packaged_names("suites"):
        assert settings_of(load_suite(name), name)


def test_a_suites_wrong_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(json.dumps({"tasks": [{"kind": "text", "name": "a", "contxt": 3}]}))
    with pytest.raises(UsageError, match="contxt: unknown key"):
        settings_of(load_suite(str(path)), "suite")
    path.write_text(json.dumps({"tasks": [{"kind": "text", "name": "a"}, {"kind": "text", "name": "a"}]}))
    with pytest.raises(UsageError, match="name of its own"):
        load_suite(str(path))
    with pytest.raises(UsageError, match="smoke"):
        load_suite("absent")
