"""A build in shares: collected it has the bytes of one that was made at once, whatever stops whom and wherever."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qconv.building.collect_pipeline import collect
from qconv.building.gguf_pipeline import quantize_gguf
from qconv.building.imatrix_pipeline import write_model_imatrix
from qconv.building.joining import Shares
from qconv.building.output import Outcome
from qconv.building.pipeline import quantize
from qconv.building.share import keys_of_share
from qconv.core.settings import TextSettings
from qconv.errors import OutputError, StaleJournalError, UsageError, VerificationError
from qconv.folders.journal import Journal, locked
from qconv.planning.gguf_recipe import GgufRecipe, parse_gguf_recipe
from qconv.planning.recipe import Recipe
from tests.conftest import BUNDLED, folder_bytes, small_recipe

QUIET: Mapping[str, Any] = {"threads": 2, "progress": lambda *_: None, "log": lambda _: None}
GGUF = {"output": {"max_shard_size": 3_000_000}}
RECIPES: dict[str, Recipe | GgufRecipe] = {
    "w4a16": small_recipe("rtn", "w4a16"),
    "fp8": small_recipe("rtn", "fp8_dynamic", grid={"bits": 8, "group_size": -1}),
    "gguf": parse_gguf_recipe({"type": "Q8_0", **GGUF}),
}


class Stop(Exception):
    """The plug is pulled."""


def make(model: Path, out: Path, recipe: Recipe | GgufRecipe, part: tuple[int, int] | None, **options: Any) -> Outcome:
    given = {**QUIET, **options}
    if isinstance(recipe, GgufRecipe):
        return quantize_gguf(model, out, recipe, part=part, **given)
    return quantize(model, out, recipe, part=part, **given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    """What a recipe becomes at once."""
    found: dict[str, dict[str, bytes]] = {}

    def made(name: str) -> dict[str, bytes]:
        if name not in found:
            out = tmp_path_factory.mktemp("whole") / "out"
            make(BUNDLED, out, RECIPES[name], None)
            found[name] = folder_bytes(out)
        return found[name]

    return made


def stopping(after: int) -> Callable[..., None]:
    """Progress that pulls the plug when it was told so often."""
    calls = iter(range(after))

    def progress(*_: object) -> None:
        if next(calls, None) is None:
            raise Stop

    return progress


@pytest.mark.parametrize("name", RECIPES)
def test_shares_become_the_build_that_is_made_at_once(
    name: str, whole: Callable[[str], dict[str, bytes]], tmp_path: Path
) -> None:
    out, recipe = tmp_path / "out", RECIPES[name]
    with pytest.raises(Stop):
        make(BUNDLED, out, recipe, (2, 3), progress=stopping(9))
    for number in (3, 1, 2):
        outcome = make(BUNDLED, out, recipe, (number, 3))
        assert outcome.share is not None
        assert outcome.out == tmp_path / f"out.parts/{number}-of-3"
        assert sorted(path.name for path in outcome.out.iterdir() if path.name != ".qconv")
    assert not out.exists()
    assert make(BUNDLED, out, recipe, (2, 3)).share is not None, "made again nothing happens"
    collected = collect(out, **QUIET)
    assert collected is not None
    assert folder_bytes(out) == whole(name)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert collect(out, **QUIET) is None
    assert make(BUNDLED, out, recipe, None).already_complete


@pytest.mark.parametrize("name", ["w4a16", "gguf"])
def test_a_collection_that_is_stopped_anywhere_goes_on(
    name: str, whole: Callable[[str], dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        make(BUNDLED, tmp_path / "out", RECIPES[name], (number, 2))

    def after(calls: int, real: Callable[..., Any]) -> Callable[..., Any]:
        left = iter(range(calls))

        def called(*arguments: Any) -> Any:
            if next(left, None) is None:
                raise Stop
            return real(*arguments)

        return called

    places = ((Journal, "commit", 0), (Journal, "commit", 3), (os, "rename", 2), (Journal, "announce", 1))
    for place, function, calls in (*places, (Journal, "see_source", 0), (Shares, "remove", 0)):
        out = tmp_path / f"{function}{calls}" / "out"
        shutil.copytree(tmp_path / "out.parts", out.with_name("out.parts"))
        with monkeypatch.context() as patched:
            patched.setattr(place, function, after(calls, getattr(place, function)))
            with pytest.raises(Stop):
                collect(out, **QUIET)
        collect(out, **QUIET)
        assert folder_bytes(out) == whole(name)
        assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_importance_matrix_that_is_given_serves_all_shares(tmp_path: Path) -> None:
    write_model_imatrix(BUNDLED, tmp_path / "imatrix", TextSettings(tokens=512, sequence_length=128), **QUIET)
    given = {"files": [str(tmp_path / "imatrix/imatrix.gguf")]}
    recipe = parse_gguf_recipe({"type": "IQ4_XS", "imatrix": given, **GGUF})
    make(BUNDLED, tmp_path / "whole", recipe, None)
    for number in (1, 2):
        make(BUNDLED, tmp_path / "out", recipe, (number, 2))
    collect(tmp_path / "out", **QUIET)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_what_is_calibrated_has_no_shares(tmp_path: Path) -> None:
    gptq = small_recipe("gptq", "gptq")
    for recipe in (gptq, parse_gguf_recipe({"type": "IQ2_XS"}), parse_gguf_recipe({"type": "Q4_0", "calibration": {}})):
        with pytest.raises(UsageError, match="--part 1/2: this build looks at layers"):
            make(BUNDLED, tmp_path / "out", recipe, (1, 2))
    assert list(tmp_path.iterdir()) == []


def test_there_are_no_more_shares_than_units(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--part 7/7: the build has 6"):
        make(BUNDLED, tmp_path / "out", RECIPES["w4a16"], (7, 7))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A build whose two shares are made."""
    for number in (1, 2):
        make(BUNDLED, tmp_path / "out", RECIPES["w4a16"], (number, 2))
    return tmp_path / "out"


def test_without_shares_there_is_nothing_to_collect(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no part"):
        collect(tmp_path / "out", **QUIET)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_share_is_named(out: Path) -> None:
    shutil.rmtree(out.with_name("out.parts") / "1-of-2")
    with pytest.raises(UsageError, match="1-of-2 is missing") as told:
        collect(out, **QUIET)
    assert "--part 1/2" in str(told.value)
    assert not out.exists()


def test_an_unfinished_share_is_named(tmp_path: Path) -> None:
    make(BUNDLED, tmp_path / "out", RECIPES["w4a16"], (1, 2))
    with pytest.raises(Stop):
        make(BUNDLED, tmp_path / "out", RECIPES["w4a16"], (2, 2), progress=stopping(12))
    with pytest.raises(UsageError, match=r"2-of-2: is not finished: \d of 3 are left") as told:
        collect(tmp_path / "out", **QUIET)
    assert "--part 2/2" in str(told.value)


def test_shares_of_two_counts_are_not_mixed(out: Path) -> None:
    make(BUNDLED, out, RECIPES["w4a16"], (1, 3))
    with pytest.raises(UsageError, match="parts of 2 and of 3"):
        collect(out, **QUIET)


def test_a_share_of_another_recipe_is_refused(tmp_path: Path) -> None:
    make(BUNDLED, tmp_path / "out", RECIPES["w4a16"], (1, 2))
    other = small_recipe("rtn", "w4a16", grid={"bits": 4, "group_size": 64})
    make(BUNDLED, tmp_path / "out", other, (2, 2))
    with pytest.raises(StaleJournalError, match=r"2-of-2: belongs to another run: .*recipe"):
        collect(tmp_path / "out", **QUIET)


def test_a_share_of_another_model_is_refused(tmp_path: Path) -> None:
    """Two nodes whose copies differ in one weight."""
    other = tmp_path / BUNDLED.name
    shutil.copytree(BUNDLED, other)
    shard = sorted(other.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = max(tensors, key=lambda one: tensors[one].numel())
    tensors[name].view(torch.int16).bitwise_xor_(1)
    save_file(tensors, shard, {"format": "pt"})
    make(BUNDLED, tmp_path / "out", RECIPES["w4a16"], (1, 2))
    make(other, tmp_path / "out", RECIPES["w4a16"], (2, 2))
    with pytest.raises(StaleJournalError, match="weights"):
        collect(tmp_path / "out", **QUIET)


def test_copies_of_the_model_on_other_disks_are_one(whole: Callable[[str], dict[str, bytes]], tmp_path: Path) -> None:
    """As nodes have them that share no file system with the model: read again where it is collected."""
    other = tmp_path / "copy" / BUNDLED.name
    shutil.copytree(BUNDLED, other)
    make(other, tmp_path / "out", RECIPES["w4a16"], (1, 2))
    make(BUNDLED, tmp_path / "out", RECIPES["w4a16"], (2, 2))
    shutil.rmtree(other)
    read: list[str] = []
    collect(tmp_path / "out", BUNDLED, **{**QUIET, "progress": lambda what, *_: read.append(what)})
    assert any("reading its source again" in what for what in read)
    assert folder_bytes(tmp_path / "out") == whole("w4a16")


def test_a_share_that_is_being_made_is_waited_for(out: Path) -> None:
    with locked(out.with_name("out.parts") / "2-of-2"), pytest.raises(OutputError, match="another qconv process"):
        collect(out, **QUIET)


def test_damage_on_the_way_is_found(out: Path) -> None:
    shard = sorted((out.with_name("out.parts") / "2-of-2").glob("*.safetensors"))[0]
    with shard.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    with pytest.raises(VerificationError, match=f"{shard.name}: changed since"):
        collect(out, **QUIET)


def test_nothing_of_others_is_touched(out: Path) -> None:
    parts = out.with_name("out.parts")
    (parts / "1-of-2/notes.txt").write_text("mine")
    (parts / "log").write_text("mine")
    collect(out, **QUIET)
    assert sorted(str(path.relative_to(parts)) for path in parts.rglob("*") if path.is_file()) == [
        "1-of-2/notes.txt",
        "log",
    ]


def test_a_foreign_folder_is_not_collected_into(out: Path) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not a build of qconv"):
        collect(out, **QUIET)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert collect(out, **QUIET) is not None


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=30), st.data())
def test_every_unit_is_of_one_share(sizes: list[int], data: st.DataObject) -> None:
    units = {f"{at:02d}": size for at, size in enumerate(sizes)}
    count = data.draw(st.integers(1, len(sizes)))
    shares = [sorted(keys_of_share(units, number, count)) for number in range(1, count + 1)]
    assert all(shares)
    assert [key for share in shares for key in share] == list(units)


def test_shares_are_about_alike() -> None:
    units = {f"{at:03d}": size for at, size in enumerate([300, *[100] * 62, 300])}
    for count in (2, 3, 7, 16):
        taken = [sum(units[key] for key in keys_of_share(units, number, count)) for number in range(1, count + 1)]
        assert max(taken) <= sum(units.values()) / count + 150
