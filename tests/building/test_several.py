"""Several builds of one calibration: each is what it is alone, to the byte, whatever stops the run and wherever."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from qconv.building import gguf_stages
from qconv.building.gguf_pipeline import quantize_gguf
from qconv.building.output import Outcome
from qconv.building.pipeline import quantize
from qconv.building.several_pipeline import quantize_several
from qconv.calibration import squares
from qconv.calibration.routing import Routing
from qconv.core.settings import OutputSettings
from qconv.errors import CheckpointError, OutputError, QconvError, StaleJournalError, UsageError, VerificationError
from qconv.folders.journal import WORK_FOLDER
from qconv.folders.state import CHECKSUMS_NAME, require_finished
from qconv.planning.gguf_recipe import GgufRecipe, parse_gguf_recipe
from qconv.planning.recipe import Recipe
from qconv.verification.build import verify
from qconv.verification.gguf import verify_gguf
from tests.conftest import folder_bytes, random_model, save_model, small_recipe

TEXT = {"tokens": 128, "sequence_length": 32, "shrinkage_tokens": 16}
Recipes = Mapping[str, Recipe | GgufRecipe]


class Stop(Exception):
    """The plug is pulled."""


def gguf(file_type: str = "Q4_0", **keys: Any) -> GgufRecipe:
    """A GGUF build in several files."""
    recipe = parse_gguf_recipe({"type": file_type, **keys})
    return recipe.model_copy(update={"output": OutputSettings.model_construct(max_shard_size=60_000)})


REFINED = {"refine": {"sweeps": 1, "refits": 1}}
BUILDS: dict[str, Recipe | GgufRecipe] = {
    "awq": small_recipe("awq", "awq"),
    "gptq": small_recipe("gptq", "gptq", **REFINED),
    "both": small_recipe("awq+gptq", "w4a16"),
    "static": small_recipe("rtn", "fp8_static", grid={"bits": 8, "group_size": -1}),
    "rtn": small_recipe("rtn", "w4a16"),
    "fp8": small_recipe("rtn", "fp8_dynamic", grid={"bits": 8, "group_size": -1}),
    "gguf": gguf("Q4_0", calibration=TEXT, **REFINED),
    "gguf-rtn": gguf("Q8_0"),
    "gguf-imatrix": gguf("IQ4_NL", method="rtn", calibration={"tokens": 128, "sequence_length": 32}),
}
"""Every kind of target."""
CALIBRATED = ("awq", "gptq", "both", "static", "gguf")
SETS = [
    ("awq", "gptq"),
    ("gguf", "gptq"),
    ("both", "gguf", "static"),
    ("awq", "fp8", "gguf-rtn"),
    ("gguf-imatrix", "gptq", "rtn"),
    ("gguf-imatrix", "gguf-rtn"),
    ("fp8", "rtn"),
]


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse model whose routing llama.cpp can express."""
    return save_model(random_model("qwen3_moe", norm_topk_prob=True), tmp_path_factory.mktemp("sparse") / "model")


def several(model: Path, out: Path, names: tuple[str, ...], **options: Any) -> dict[str, Outcome]:
    """Make them without progress and log."""
    return make(model, out, {name: BUILDS[name] for name in names}, **options)


def make(model: Path, out: Path, recipes: Recipes, **options: Any) -> dict[str, Outcome]:
    return quantize_several(
        model, out, recipes, **{"threads": 2, "progress": lambda *_: None, "log": lambda _: None, **options}
    )


@pytest.fixture(scope="module")
def alone(sparse: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What each build is when it is made by itself, its calibrated layers on the outputs of unquantized ones."""
    found = {}
    for name, recipe in BUILDS.items():
        out = tmp_path_factory.mktemp("alone") / name
        options: dict[str, Any] = {"threads": 2, "progress": lambda *_: None, "log": lambda _: None}
        if name in CALIBRATED and recipe.calibration is not None:
            settings = recipe.calibration.model_copy(update={"propagate": False})
            recipe = recipe.model_copy(update={"calibration": settings})
        if isinstance(recipe, Recipe):
            quantize(sparse, out, recipe, **options)
        else:
            quantize_gguf(sparse, out, recipe, **options)
        found[name] = folder_bytes(out)
    return found


@pytest.mark.parametrize("names", SETS, ids="+".join)
def test_each_is_what_it_is_alone(
    names: tuple[str, ...], sparse: Path, alone: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    made = several(sparse, out, names)
    assert sorted(made) == sorted(names) == sorted(path.name for path in out.iterdir())
    for name, outcome in made.items():
        assert folder_bytes(out / name) == alone[name]
        assert (outcome.out, outcome.already_complete) == (out / name, False)
        is_gguf = isinstance(BUILDS[name], GgufRecipe)
        assert (verify_gguf(out / name, sparse) if is_gguf else verify(out / name, against=sparse)).problems == []
    again = several(sparse, out, tuple(reversed(names)))
    assert all(outcome.already_complete for outcome in again.values())


def test_threads_and_the_order_of_the_builds_make_no_difference(
    sparse: Path, alone: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    for threads in (1, 3):
        out = tmp_path / str(threads)
        several(sparse, out, ("gptq", "gguf", "awq")[:: threads - 2], threads=threads)
        assert all(folder_bytes(out / name) == alone[name] for name in ("gptq", "gguf", "awq"))


def test_a_layer_is_looked_at_once_for_all(sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is routed twice, and no pass is made for the importance matrix alone."""
    routed: list[int] = []
    real = Routing.__init__

    def count(self: Routing, source: Any, decoder: Any, layer: Any, *more: Any) -> None:
        routed.append(layer.index)
        real(self, source, decoder, layer, *more)

    monkeypatch.setattr(Routing, "__init__", count)
    monkeypatch.setattr(squares, "_attention", None)
    several(sparse, tmp_path / "out", ("awq", "gguf", "gguf-imatrix", "gptq"))
    assert routed == [0, 1]


MIXED = ("awq", "fp8", "gguf", "gguf-imatrix")


@pytest.fixture(scope="module")
def mixed(sparse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of every kind, made together; do not write to it."""
    out = tmp_path_factory.mktemp("mixed") / "out"
    several(sparse, out, MIXED)
    return out


def stop_at(most: int) -> Any:
    """A progress callback that pulls the plug at a call."""
    left = iter(range(most))

    def progress(*_: object, left: Iterator[int] = left) -> None:
        if next(left, None) is None:
            raise Stop

    return progress


def test_stopped_anywhere_and_resumed_the_bytes_are_the_same(sparse: Path, mixed: Path, tmp_path: Path) -> None:
    shown: list[tuple[str, int, int]] = []
    several(sparse, tmp_path / "whole", MIXED, progress=lambda *one: shown.append(one))
    assert folder_bytes(tmp_path / "whole") == folder_bytes(mixed)
    making = [one for one in shown if one[0] != "scales"]
    assert {total for _, _, total in making} == {making[0][2]}
    assert [done for _, done, _ in making] == sorted(done for _, done, _ in making)
    assert making[-1] == ("finishing", making[-1][2], making[-1][2])
    out = tmp_path / "out"
    stops = 0
    for most in range(2, len(shown), max(1, len(shown) // 9)):
        try:
            several(sparse, out, MIXED, progress=stop_at(most))
        except Stop:
            stops += 1
    assert stops >= 3
    several(sparse, out, MIXED)
    assert folder_bytes(out) == folder_bytes(mixed)


def test_stopped_between_the_commits_of_a_layer_only_the_missing_ones_are_made(
    sparse: Path, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out", gguf_stages.StagedLayers.commit

    def crash(self: Any, layer: Any, *more: Any) -> None:
        if layer.index == 1:
            raise Stop
        real(self, layer, *more)

    with monkeypatch.context() as patch:
        patch.setattr(gguf_stages.StagedLayers, "commit", crash)
        with pytest.raises(Stop):
            several(sparse, out, MIXED)
    kept = (out / "awq/model-00003-of-00004.safetensors").stat().st_mtime_ns
    several(sparse, out, MIXED)
    assert folder_bytes(out) == folder_bytes(mixed)
    assert (out / "awq/model-00003-of-00004.safetensors").stat().st_mtime_ns == kept


def refused(kind: type[QconvError], code: int, *texts: str) -> Any:
    """A context that expects an error of a kind, with all of the texts in its message."""
    assert kind.exit_code == code
    return pytest.raises(kind, match="(?s)" + "".join(f"(?=.*{text})" for text in texts))


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"tokens": 256}, r"tokens is 128 .* and 256"), ({"routing": "all-experts"}, r"routing is routed .* all-experts")],
)
def test_builds_that_do_not_agree_are_refused(sparse: Path, tmp_path: Path, changes: Any, said: str) -> None:
    other = small_recipe("gptq", "gptq", calibration=changes)
    with refused(UsageError, 2, "awq", "other", said):
        make(sparse, tmp_path / "out", {"awq": BUILDS["awq"], "other": other})
    # What is not calibrated agrees with everything, and an importance matrix asks for the text alone.
    make(sparse, tmp_path / "rtn", {"rtn": BUILDS["rtn"], "other": other})
    if "tokens" in changes:
        with refused(UsageError, 2, "gguf-imatrix"):
            make(sparse, tmp_path / "out", {"gguf-imatrix": BUILDS["gguf-imatrix"], "other": other})
    else:
        make(sparse, tmp_path / "imatrix", {"gguf-imatrix": BUILDS["gguf-imatrix"], "other": other})


def test_another_run_is_not_continued(sparse: Path, mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        several(sparse, out, ("awq", "gptq"), progress=stop_at(8))
    changed = {name: small_recipe("awq", "awq", calibration={"seed": 1}) for name in ("awq",)}
    with refused(StaleJournalError, 5, "recipe of awq", "calibration data"):
        make(sparse, out, {**changed, "gptq": small_recipe("gptq", "gptq", calibration={"seed": 1}, **REFINED)})
    with refused(StaleJournalError, 5, "recipe of both"):
        several(sparse, out, ("awq", "both"))
    several(sparse, out, ("awq", "gptq"))
    copied = Path(shutil.copytree(mixed, tmp_path / "copied"))
    skipping = {name: BUILDS[name] for name in MIXED} | {"awq": small_recipe("awq", "awq", skip=["*.self_attn.*"])}
    with refused(StaleJournalError, 5, "recipe"):
        make(sparse, copied, skipping)


def test_what_was_damaged_between_runs_is_noticed(sparse: Path, mixed: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(mixed, tmp_path / "out"))
    shard = out / "fp8/model-00002-of-00004.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with refused(VerificationError, 5, "fp8", shard.name):
        several(sparse, out, MIXED)
    shard.write_bytes(whole)
    assert all(outcome.already_complete for outcome in several(sparse, out, MIXED).values())
    # Of an unfinished run: a committed file that is gone.
    out, shard = tmp_path / "unfinished", tmp_path / "unfinished/awq/model-00002-of-00004.safetensors"

    def stop(what: str, *_: int) -> None:
        if what == "layer-00001":
            raise Stop

    with pytest.raises(Stop):
        several(sparse, out, MIXED, progress=stop)
    assert shard.exists()
    shard.unlink()
    with refused(VerificationError, 5, shard.name, "was committed but is now missing"):
        several(sparse, out, MIXED)


def test_folders_that_are_not_this_runs_are_left_alone(sparse: Path, mixed: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(mixed, tmp_path / "out"))
    # Some of the builds are there and others are not.
    with refused(OutputError, 1, "awq, fp8, gguf-imatrix", "which no run began"):
        shutil.rmtree(out / "gguf")
        several(sparse, out, MIXED)
    (out / "awq/notes.txt").write_text("mine")
    before = folder_bytes(out)
    with refused(OutputError, 1, "awq/notes.txt"):
        several(sparse, out, MIXED, restart=True)
    assert folder_bytes(out) == before
    (out / "awq/notes.txt").unlink()
    several(sparse, out, MIXED, restart=True)
    assert folder_bytes(out) == folder_bytes(mixed)
    (tmp_path / "foreign/other").mkdir(parents=True)
    with refused(OutputError, 1, "not a run of these builds", "other"):
        several(sparse, tmp_path / "foreign", MIXED)


def test_restart_replaces_what_is_there_and_a_killed_one_can_be_taken_back(
    sparse: Path, mixed: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(mixed, tmp_path / "out"))
    with pytest.raises(Stop):
        several(sparse, out, MIXED, restart=True, progress=stop_at(6))
    assert (out / WORK_FOLDER).is_dir()
    assert not (out / "awq" / CHECKSUMS_NAME).exists()
    with pytest.raises(CheckpointError, match="awq: an unfinished build"):
        require_finished(out / "awq")
    several(sparse, out, MIXED)
    assert folder_bytes(out) == folder_bytes(mixed)
    require_finished(out / "awq")


def test_the_log_says_that_layers_are_seen_unquantized(sparse: Path, mixed: Path, tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(Stop):
        several(sparse, tmp_path / "out", MIXED, log=said.append, progress=stop_at(10))
    assert any("propagate: false" in sentence for sentence in said)
    for name in ("awq", "gguf"):
        assert b'"propagate": false' in (mixed / name / "qconv-report.json").read_bytes()
    said.clear()
    several(sparse, tmp_path / "out", MIXED, log=said.append)
    resuming = next(sentence for sentence in said if sentence.startswith("resuming"))
    assert "awq: " in resuming
    assert "units are committed" in resuming
