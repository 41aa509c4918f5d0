"""A source that changes under a run is found where the fingerprint has no sample; one that does not is read once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qconv.building.gguf_pipeline import quantize_gguf
from qconv.building.imatrix_pipeline import write_model_imatrix
from qconv.checkpoint import samples
from qconv.checkpoint.header import read_header
from qconv.checkpoint.reader import Checkpoint
from qconv.core.settings import OutputSettings, TextSettings
from qconv.errors import ArtifactError, CheckpointError, StaleJournalError
from qconv.executors.threads import Threads
from qconv.folders.journal import Journal
from qconv.folders.readings import SourceRecord, checksum
from qconv.planning.gguf_recipe import parse_gguf_recipe
from tests.conftest import build, folder_bytes, random_model, save_model, small_recipe

Run = Callable[..., Any]
TEXT = TextSettings(tokens=128, sequence_length=32)


class Stop(Exception):
    """The plug is pulled."""


def quantized(method: str, output_format: str) -> Run:
    return lambda model, out, **given: build(model, out, small_recipe(method, output_format), **given)


def gguf(model: Path, out: Path, **given: Any) -> Any:
    recipe = parse_gguf_recipe({"type": "Q4_0"})
    # Smaller than a recipe may say, so that the small model has several files.
    recipe = recipe.model_copy(update={"output": OutputSettings.model_construct(max_shard_size=60_000)})
    return quantize_gguf(model, out, recipe, threads=2, log=lambda _: None, **given)


def imatrix(model: Path, out: Path, **given: Any) -> Any:
    return write_model_imatrix(model, out, TEXT, threads=2, log=lambda _: None, **given)


RUNS: dict[str, tuple[Run, str]] = {
    "rtn": (quantized("rtn", "w4a16"), "layer-00001"),
    "awq": (quantized("awq", "awq"), "layer-00001"),
    "gguf": (gguf, "00004-of"),
    "imatrix": (imatrix, "imatrix layer 1"),
}
"""Each kind of run, and what it shows once the first layer is committed."""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of whose shards the fingerprint sees the first page alone, as of large ones it sees 64."""
    monkeypatch.setattr(samples, "_SAMPLES_PER_SHARD", 1)
    return save_model(random_model("qwen3_moe", norm_topk_prob=True), tmp_path / "model")


def stopped(run: Run, model: Path, out: Path, shown: str, then: Callable[[], None] = lambda: None) -> None:
    """Run until something is shown; then the plug is pulled, or what ``then`` does is done."""

    def progress(what: str, done: int, total: int) -> None:
        if shown in what:
            then()
            raise Stop

    with pytest.raises(Stop):
        run(model, out, progress=progress)


def change(model: Path, name: str) -> None:
    """Change a weight's last element by one unit in the last place; size and time of its shard stay."""
    entry = Checkpoint.open(model).entry(name)
    before = entry.file.stat()
    with entry.file.open("r+b") as file:
        file.seek(entry.offset + entry.nbytes - 2)  # bf16: the low byte comes first
        (low,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([low ^ 1]))
    os.utime(entry.file, ns=(before.st_atime_ns, before.st_mtime_ns))


EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize("kind", RUNS)
def test_a_source_that_changed_after_a_kill_is_refused_and_the_old_one_goes_on(
    kind: str, model: Path, tmp_path: Path
) -> None:
    run, shown = RUNS[kind]
    out = tmp_path / "out"
    whole = folder_bytes(run(model, tmp_path / "whole", progress=lambda *_: None).out)
    stopped(run, model, out, shown)
    fingerprint = Checkpoint.open(model).fingerprint()
    change(model, EXPERT)
    assert Checkpoint.open(model).fingerprint() == fingerprint  # or this would test something else
    with pytest.raises(StaleJournalError, match=r"changed since .* was made of it") as caught:
        run(model, out, progress=lambda *_: None)
    assert caught.value.exit_code == 5
    assert str(model) in caught.value.message
    change(model, EXPERT)  # back again: other times of change, the same bytes
    assert folder_bytes(run(model, out, progress=lambda *_: None).out) == whole


@pytest.mark.parametrize("kind", RUNS)
def test_a_source_that_changed_before_the_end_of_the_run_is_refused(kind: str, model: Path, tmp_path: Path) -> None:
    run, shown = RUNS[kind]
    out = tmp_path / "out"

    def progress(what: str, done: int, total: int) -> None:
        if shown in what and not changed:
            changed.append(what)
            change(model, EXPERT)

    changed: list[str] = []
    # What was committed before is another one now; what was just being made may be of either.
    with pytest.raises(ArtifactError, match=r"changed since .* was made of it|while it was read") as caught:
        run(model, out, progress=progress)
    assert changed
    assert caught.value.exit_code == 5
    assert not (out / "SHA256SUMS").exists()


def test_an_embedding_that_changed_before_it_was_committed_makes_new_activations(model: Path, tmp_path: Path) -> None:
    run = quantized("awq", "awq")
    stopped(run, model, tmp_path / "out", "embeddings")
    assert (tmp_path / "out/.qconv/inputs-00000.bin").exists()
    change(model, "model.embed_tokens.weight")
    # Of the changed model nothing is mixed: no unit was committed.
    found = folder_bytes(run(model, tmp_path / "out", progress=lambda *_: None).out)
    assert found == folder_bytes(run(model, tmp_path / "whole", progress=lambda *_: None).out)


def test_a_shard_that_is_written_while_a_layer_is_made_ends_the_run(model: Path, tmp_path: Path) -> None:
    run = quantized("awq", "awq")
    shard = read_header(Checkpoint.open(model).entry(EXPERT).file)[EXPERT].file

    def touch() -> None:
        os.utime(shard)  # as any writing does

    def progress(what: str, done: int, total: int) -> None:
        if what == "layer-00000":
            touch()

    with pytest.raises(CheckpointError, match="given other attributes while it was read"):
        run(model, tmp_path / "out", progress=progress)
    # Its bytes are as they were, so the same command goes on.
    found = folder_bytes(run(model, tmp_path / "out", progress=lambda *_: None).out)
    assert found == folder_bytes(run(model, tmp_path / "whole", progress=lambda *_: None).out)


def test_what_nobody_touched_is_not_read_again(model: Path, tmp_path: Path) -> None:
    read: list[str] = []

    def reading(name: str) -> str:
        read.append(name)
        return name

    checkpoint = Checkpoint.open(model)
    journal = Journal.create(tmp_path / "journal.jsonl", {})
    readings = {name: lambda name=name: reading(name) for name in ("a", "b")}
    SourceRecord(checkpoint, journal, readings).require_unchanged(lambda *_: None)
    SourceRecord(checkpoint, journal, readings).commit("a", {"read": "a"})
    SourceRecord(checkpoint, journal, readings).require_unchanged(lambda *_: None)
    assert read == []
    os.utime(checkpoint.files[0], ns=(1, 1))
    SourceRecord(checkpoint, journal, readings).require_unchanged(lambda *_: None)
    assert read == ["a"]  # what is committed, and that once
    loaded = Journal.load(tmp_path / "journal.jsonl")
    assert loaded is not None
    SourceRecord(checkpoint, loaded, readings).require_unchanged(lambda *_: None)
    assert read == ["a"]


def test_a_checksum_sees_every_tensor_and_which_is_which(model: Path) -> None:
    first, second = (f"model.layers.0.mlp.experts.{index}.up_proj.weight" for index in (1, 2))
    with Threads(2) as workers:
        before = checksum(Checkpoint.open(model), [first, second], workers)
        assert checksum(Checkpoint.open(model), [second, first], workers) == before
        change(model, second)
        assert checksum(Checkpoint.open(model), [first, second], workers) != before
        assert checksum(Checkpoint.open(model), [first], workers) != before
    entries = Checkpoint.open(model).entries
    exchanged = {**entries, first: entries[second], second: entries[first]}
    with Threads(2) as workers:
        after = checksum(Checkpoint.open(model), [first, second], workers)
        swapped = Checkpoint(exchanged, model, {})
        assert checksum(swapped, [first, second], workers) != after
