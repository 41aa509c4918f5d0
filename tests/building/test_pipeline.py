"""Whole builds: interrupted anywhere and resumed, refused for every kind of bad input, and the same bytes each time."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qconv.building import output, run, safetensors_target
from qconv.building.committer import UnitWriter
from qconv.calibration.stream import LayerStream
from qconv.checkpoint import reader
from qconv.errors import (
    CheckpointError,
    OutputError,
    QconvError,
    RecipeError,
    StaleJournalError,
    UsageError,
    VerificationError,
)
from qconv.folders.journal import JOURNAL_NAME, WORK_FOLDER, Journal
from qconv.folders.state import CHECKSUMS_NAME
from qconv.planning.recipe import Recipe, load_recipe
from qconv.verification.build import verify
from tests.artifacts.test_source import edit_tensors
from tests.conftest import REPOSITORY, build, folder_bytes, small_recipe

RTN = small_recipe()
AWQ = small_recipe("awq", "awq")
Edit = Callable[..., None]


class Stop(Exception):
    """The plug is pulled."""


def stop_at(call: int) -> Callable[[str, int, int], None]:
    """A progress callback that stops the run at its n-th call."""
    calls = iter(range(call + 1))

    def progress(key: str, done: int, total: int) -> None:
        if next(calls) == call:
            raise Stop(key)

    return progress


def calls_of(model: Path, out: Path, recipe: Recipe) -> list[str]:
    """What a whole run tells its progress callback."""
    keys: list[str] = []
    build(model, out, recipe, progress=lambda key, done, total: keys.append(key))
    return keys


def no_final_names(out: Path) -> bool:
    """Whether nothing in the folder could be taken for a build or a part of one."""
    return not out.exists() or not [file for file in out.iterdir() if file.name != WORK_FOLDER]


def refused(
    model: Path, out: Path, recipe: Recipe, kind: type[QconvError], code: int, *parts: str, **options: Any
) -> QconvError:
    """The build fails with an error of that kind and exit code whose message holds all parts."""
    with pytest.raises(QconvError) as caught:
        build(model, out, recipe, **options)
    assert type(caught.value) is kind
    assert caught.value.exit_code == code
    for part in parts:
        assert part in caught.value.message, caught.value.message
    return caught.value


def test_a_build_holds_what_it_should_and_nothing_else(moe: Path, rtn_build: Path, awq_build: Path) -> None:
    common = {
        *(f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)),
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
        "qconv-report.json",
        CHECKSUMS_NAME,
    }
    assert folder_bytes(rtn_build).keys() == common
    assert folder_bytes(awq_build).keys() == common | {f"qconv-scales/layer-0000{n}.safetensors" for n in (0, 1)}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (rtn_build / name).read_bytes() == (moe / name).read_bytes()
    weight_map = json.loads((rtn_build / "model.safetensors.index.json").read_text())["weight_map"]
    found = {name: path.name for path in rtn_build.glob("*.safetensors") for name in load_file(path)}
    assert weight_map == found


def test_nothing_in_a_build_tells_where_or_when_it_was_made(moe: Path, rtn_build: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(moe, tmp_path / "elsewhere" / moe.name))
    again = build(moved, tmp_path / "other name", RTN).out
    assert folder_bytes(again) == folder_bytes(rtn_build)


def test_how_much_of_a_weight_is_mapped_at_once_makes_no_difference(
    rtn_build: Path, moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "BLOCK_BYTES", 7 * 64 * 2)
    out = build(moe, tmp_path / "out", RTN).out
    for shard in rtn_build.glob("*.safetensors"):
        assert (out / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.parametrize("recipe", [RTN, AWQ], ids=["rtn", "awq"])
def test_stopped_in_every_unit_and_resumed_the_bytes_are_the_same(
    recipe: Recipe, moe: Path, rtn_build: Path, awq_build: Path, tmp_path: Path
) -> None:
    expected = folder_bytes(rtn_build if recipe is RTN else awq_build)
    keys = calls_of(moe, tmp_path / "whole", recipe)
    assert folder_bytes(tmp_path / "whole") == expected
    # The first word of each unit, and one in the middle of each layer: shards half written, activations half made.
    firsts = [keys.index(key) for key in dict.fromkeys(keys)]
    middles = [(keys.index(key) + len(keys) - keys[::-1].index(key)) // 2 for key in ("layer-00000", "layer-00001")]
    for number, call in enumerate([*firsts, *middles]):
        out = tmp_path / str(number)
        with pytest.raises(Stop):
            build(moe, out, recipe, progress=stop_at(call))
        assert not (out / CHECKSUMS_NAME).exists()
        assert not list(out.rglob("*.partial"))
        outcome = build(moe, out, recipe)
        assert not outcome.already_complete
        assert folder_bytes(out) == expected, f"stopped at call {call}, {keys[call]}"


def test_stopped_again_and_again_it_still_ends(moe: Path, awq_build: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    calls = len(calls_of(moe, tmp_path / "whole", AWQ))
    for call in (1, calls // 3, calls // 3, calls // 2):
        with pytest.raises(Stop):
            build(moe, out, AWQ, progress=stop_at(call))
    build(moe, out, AWQ)
    assert folder_bytes(out) == folder_bytes(awq_build)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_between_a_layer_and_its_outputs_recomputes_them(
    when: str, moe: Path, awq_build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    seal = LayerStream._seal

    def crash(self: LayerStream, index: int, *arguments: Any) -> None:
        if index == 1:
            if when == "after":
                seal(self, index, *arguments)
            raise Stop

        seal(self, index, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(LayerStream, "_seal", crash)
        with pytest.raises(Stop):
            build(moe, out, AWQ)
    lines = [json.loads(line) for line in (out / WORK_FOLDER / JOURNAL_NAME).read_text().splitlines()]
    assert [line.get("unit") for line in lines if line["kind"] == "unit"] == ["embeddings", "layer-00000"]
    assert [line["layer"] for line in lines if line["kind"] == "activations"] == ([0] if when == "before" else [0, 1])
    said: list[str] = []
    build(moe, out, AWQ, log=said.append)
    assert folder_bytes(out) == folder_bytes(awq_build)
    assert any("computing them again" in line for line in said) == (when == "before")


def test_a_layers_outputs_never_count_before_the_layer_itself(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Layers are committed beside the work on the next one. Were the outputs journalled first, a crash in between would
    # leave a run that goes on after a layer that it never wrote.
    commit = UnitWriter.commit

    def slow(self: UnitWriter, *arguments: Any) -> Any:
        time.sleep(0.3)
        return commit(self, *arguments)

    order: list[str] = []
    apply = Journal._apply

    def record(self: Journal, line: dict[str, Any]) -> None:
        order.append(line.get("unit") or f"inputs {line.get('layer')}")
        apply(self, line)

    monkeypatch.setattr(UnitWriter, "commit", slow)
    monkeypatch.setattr(Journal, "_apply", record)
    build(moe, tmp_path / "out", AWQ)
    assert order.index("layer-00000") < order.index("inputs 1")


def test_damaged_activations_are_made_again(moe: Path, awq_build: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    keys = calls_of(moe, tmp_path / "whole", AWQ)
    with pytest.raises(Stop):
        build(moe, out, AWQ, progress=stop_at(keys.index("layer-00001")))
    path = out / WORK_FOLDER / "inputs-00001.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    build(moe, out, AWQ)
    assert folder_bytes(out) == folder_bytes(awq_build)


def test_a_crash_while_finishing_or_tidying_up_is_resumed(
    moe: Path, rtn_build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*arguments: Any, **options: Any) -> None:
        raise Stop

    out = tmp_path / "out"
    for name in ("companion_files", "render_checksums"):
        with monkeypatch.context() as patch:
            patch.setattr(safetensors_target, name, crash)
            with pytest.raises(Stop):
                build(moe, out, RTN)
        assert not (out / CHECKSUMS_NAME).exists()
    with monkeypatch.context() as patch:
        patch.setattr(run, "remove_claimed", crash)
        with pytest.raises(Stop):
            build(moe, out, RTN)
    assert (out / WORK_FOLDER).exists()
    assert build(moe, out, RTN).already_complete
    assert folder_bytes(out) == folder_bytes(rtn_build)


def test_a_finished_build_is_left_alone(moe: Path, tmp_path: Path) -> None:
    out = build(moe, tmp_path / "out", RTN).out
    times = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    outcome = build(moe, out, RTN)
    assert outcome.already_complete
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == times


@pytest.mark.parametrize("finished", [True, False])
def test_other_inputs_are_refused_and_named(
    finished: bool, moe: Path, moe_copy: Path, tmp_path: Path, edit_json: Edit
) -> None:
    out = tmp_path / "out"
    if finished:
        build(moe, out, AWQ)
    else:
        with pytest.raises(Stop):
            build(moe, out, AWQ, progress=stop_at(3))
    before = folder_bytes(out)
    edit_json(moe_copy / "config.json", rms_norm_eps=1e-5)
    refused(moe_copy, out, AWQ, StaleJournalError, 5, str(out), "weights changed")
    other = small_recipe("awq", "awq", clip={"steps": 3})
    refused(moe, out, other, StaleJournalError, 5, "recipe changed")
    seed = small_recipe("awq", "awq", calibration={"seed": 9})
    refused(moe, out, seed, StaleJournalError, 5, "calibration data, recipe changed")
    assert folder_bytes(out) == before


def test_a_committed_shard_that_vanished_is_named(moe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    keys = calls_of(moe, tmp_path / "whole", RTN)
    with pytest.raises(Stop):
        build(moe, out, RTN, progress=stop_at(keys.index("head")))
    shard = out / "model-00001-of-00004.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    refused(moe, out, RTN, VerificationError, 5, shard.name, "was committed but is now missing")
    damaged = bytearray(content)
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    refused(moe, out, RTN, VerificationError, 5, shard.name, "changed since it was committed")
    assert not (out / CHECKSUMS_NAME).exists()


def test_a_foreign_folder_is_never_overwritten(moe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("mine")
    refused(moe, out, RTN, OutputError, 1, str(out), "not empty and not a build")
    assert folder_bytes(out) == {"config.json": b"mine"}
    refused(moe, out, RTN, OutputError, 1, "config.json", restart=True)  # though it looks like a model
    assert folder_bytes(out) == {"config.json": b"mine"}
    (out / "config.json").unlink()
    build(moe, out, RTN)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt.*nothing was removed"):
        build(moe, out, RTN, restart=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / CHECKSUMS_NAME).exists()


def test_the_source_is_never_the_output(moe_copy: Path) -> None:
    before = folder_bytes(moe_copy)
    refused(moe_copy, moe_copy, RTN, UsageError, 2, "overlaps")
    with pytest.raises(UsageError, match="overlaps"):
        build(moe_copy, moe_copy / "build", RTN, restart=True)
    assert folder_bytes(moe_copy) == before


HOLD = """
import sys
from pathlib import Path
from qconv.folders.journal import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused(moe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        refused(moe, out, RTN, OutputError, 1, "another qconv process")
        assert no_final_names(out)
        holder.communicate("")
    build(moe, out, RTN)


# What the issue lists as bad input, each with its own words.


def test_bad_input_missing_shard(moe_copy: Path, tmp_path: Path) -> None:
    shard = sorted(moe_copy.glob("*.safetensors"))[0]
    shard.unlink()
    refused(moe_copy, tmp_path / "out", RTN, CheckpointError, 5, "shards missing", shard.name)
    assert no_final_names(tmp_path / "out")


def test_bad_input_truncated_shard(moe_copy: Path, tmp_path: Path) -> None:
    shard = sorted(moe_copy.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(moe_copy, tmp_path / "out", RTN, CheckpointError, 5, "truncated", shard.name)
    assert no_final_names(tmp_path / "out")


def test_bad_input_lying_header(moe_copy: Path, tmp_path: Path) -> None:
    shard = sorted(moe_copy.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes().replace(b'"BF16"', b'"F32" ', 1))
    refused(moe_copy, tmp_path / "out", RTN, CheckpointError, 5, "the header lies", shard.name)
    assert no_final_names(tmp_path / "out")


def test_bad_input_wrong_dtype(moe_copy: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    edit_tensors(moe_copy, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    refused(moe_copy, tmp_path / "out", RTN, CheckpointError, 5, repr(name), "dtype F8_E4M3")
    assert no_final_names(tmp_path / "out")


@pytest.mark.parametrize("recipe", [RTN, AWQ], ids=["rtn", "awq"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    ("name", "shard"),
    [
        ("model.layers.1.mlp.experts.4.up_proj.weight", "model-00003-of-00004.safetensors"),
        ("model.layers.1.input_layernorm.weight", "model-00003-of-00004.safetensors"),
        ("model.embed_tokens.weight", "model-00001-of-00004.safetensors"),
        ("lm_head.weight", "model-00004-of-00004.safetensors"),
    ],
)
def test_bad_input_nan_weight(
    recipe: Recipe, value: float, name: str, shard: str, moe_copy: Path, tmp_path: Path
) -> None:
    if recipe is AWQ and value == value:  # one of the two is enough where a layer takes longer
        return

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[5] = value

    edit_tensors(moe_copy, damage)
    out = tmp_path / "out"
    position = "[5]" if "norm" in name else "[0, 5]"
    refused(moe_copy, out, recipe, CheckpointError, 5, "model.safetensors", repr(name), "not finite", position)
    # What was committed before it is sound and stays; the damaged layer and whatever calls the build complete is not.
    assert not (out / shard).exists()
    assert not (out / "config.json").exists()
    assert not (out / CHECKSUMS_NAME).exists()
    assert not list(out.rglob("*.partial"))


def test_bad_input_unknown_architecture(moe_copy: Path, tmp_path: Path, edit_json: Edit) -> None:
    edit_json(moe_copy / "config.json", model_type="rwkv")
    refused(moe_copy, tmp_path / "out", RTN, CheckpointError, 5, "unknown architecture", "'rwkv'")
    assert no_final_names(tmp_path / "out")


def test_bad_input_missing_tokenizer(moe_copy: Path, tmp_path: Path) -> None:
    (moe_copy / "tokenizer.json").unlink()
    refused(moe_copy, tmp_path / "out", RTN, CheckpointError, 5, "no tokenizer")
    assert no_final_names(tmp_path / "out")


def test_bad_input_unknown_recipe_key(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("grid: {bits: 4, groupsize: 64}\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml: grid\.groupsize: unknown key") as caught:
        load_recipe(str(tmp_path / "mine.yaml"))
    assert caught.value.exit_code == 2


def test_bad_input_group_size_that_does_not_divide(moe: Path, tmp_path: Path) -> None:
    recipe = small_recipe("awq", "awq", grid={"group_size": 128})
    message = refused(
        moe, tmp_path / "out", recipe, RecipeError, 2, "grid.group_size", "group size 128 does not divide"
    )
    assert "64 input features" in message.message
    assert no_final_names(tmp_path / "out")


def test_bad_input_disk_too_small_is_said_before_the_work(
    moe: Path, tmp_path: Path, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(200_000)  # the build has about half a million bytes
    refused(moe, disk / "out", RTN, OutputError, 1, "the disk would run full")
    assert no_final_names(disk / "out")


@pytest.mark.parametrize("recipe", [RTN, AWQ], ids=["rtn", "awq"])
def test_bad_input_a_disk_that_runs_full_and_is_then_made_larger(
    recipe: Recipe,
    moe: Path,
    rtn_build: Path,
    awq_build: Path,
    small_disk: Callable[[int], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = small_disk(400_000)
    out = disk / "out"
    with monkeypatch.context() as patch:
        patch.setattr(output, "require_disk", lambda folder, needed: None)  # somebody else filled it meanwhile
        refused(moe, out, recipe, OutputError, 1, "the disk is full")
    assert not list(out.rglob("*.partial"))
    assert not (out / CHECKSUMS_NAME).exists()
    for file in out.glob("*.safetensors"):
        assert load_file(file)  # what has a final name is whole
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
    build(moe, out, recipe)
    assert folder_bytes(out) == folder_bytes(rtn_build if recipe is RTN else awq_build)


def test_bad_input_calibration_text_shorter_than_asked(moe: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("def f():\n    return 1\n" * 5)
    recipe = small_recipe("awq", "awq", calibration={"corpus": f"text:{tmp_path / 'short.txt'}", "tokens": 4096})
    refused(moe, tmp_path / "out", recipe, UsageError, 2, "short.txt", "4,096 were asked for")
    assert no_final_names(tmp_path / "out")


def test_a_read_only_folder_is_an_output_error(moe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(moe, tmp_path / "file/out", RTN, OutputError, 1, str(tmp_path / "file/out"))


@pytest.mark.parametrize("recipe", [RTN, AWQ], ids=["rtn", "awq"])
def test_a_wrong_tensor_on_disk_is_found_before_it_gets_its_name(
    recipe: Recipe, moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A format whose packing is wrong: whatever the reason, the layer must not be published.
    from qconv.formats import awq, packed

    module: Any = packed if recipe is RTN else awq
    pack = module.pack_rows
    monkeypatch.setattr(module, "pack_rows", lambda values, **rest: pack(values.flip(-1).contiguous(), **rest))
    out = tmp_path / "out"
    refused(moe, out, recipe, VerificationError, 5, "layer-00000", "does not stand for the source", "dB, below")
    assert not (out / "model-00002-of-00004.safetensors").exists()
    assert not list(out.rglob("*.partial"))


@pytest.mark.parametrize("skip", [["model.layers.0.*"], ["*.o_proj"], ["*.experts.*"]])
@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_what_a_recipe_skips_stays_and_the_build_verifies(
    skip: list[str], method: str, moe: Path, tmp_path: Path
) -> None:
    output_format = "w4a16" if method == "rtn" else "awq"
    recipe = small_recipe(method, output_format, skip=skip)
    out = build(moe, tmp_path / "out", recipe).out
    result = verify(out, moe)
    assert result.problems == []
    assert not [name for name in result.snr_db if recipe.skips(name)]
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    plain = [name for name in weight_map if name.endswith("proj.weight")]
    assert plain
    assert all(recipe.skips(name.removesuffix(".weight")) for name in plain)
