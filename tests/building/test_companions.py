"""What a build takes over from its model's folder: plain files of that folder, of names that a list can hold."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qconv.artifacts.source import companions
from qconv.building.gguf_pipeline import quantize_gguf
from qconv.building.imatrix_pipeline import write_model_imatrix
from qconv.chat.files import ADDITIONAL_FOLDER
from qconv.core.settings import TextSettings
from qconv.errors import CheckpointError, UsageError
from qconv.evaluation.artifacts import identify
from qconv.folders.state import CHECKSUMS_NAME
from qconv.planning.gguf_recipe import parse_gguf_recipe
from qconv.runtime.tokenizer import load_tokenizer
from qconv.verification.build import verify
from qconv.verification.checksums import parse_checksums
from tests.conftest import EXPERTS, build, random_model, save_model, small_recipe
from tests.gguf_families import LATENT
from tests.kimi import ROWS, save_kimi

NAMES = ("tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE")


def model_folder(folder: Path) -> Path:
    """A folder with a few companions and what is none."""
    folder.mkdir(parents=True)
    for name in (*NAMES, "notes.txt"):
        (folder / name).write_text(name)
    (folder / "tokenizer").mkdir()
    return folder


def link(file: Path, target: str | Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to(target)


def test_companions_are_found_by_name(tmp_path: Path) -> None:
    assert [file.name for file in companions(model_folder(tmp_path / "m"))] == sorted(NAMES)


def test_a_link_within_the_folder_is_followed_whatever_leads_to_the_folder(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "real")
    link(folder / "LICENSE", "notes.txt")
    link(folder / "LICENSE.txt", folder.resolve() / "notes.txt")
    (tmp_path / "alias").symlink_to(folder, target_is_directory=True)
    for path in (folder, tmp_path / "alias"):
        assert {"LICENSE", "LICENSE.txt"} < {file.name for file in companions(path)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", ["../private", "{root}/private", "../m-other/private", "notes/../../private"])
def test_a_link_out_of_the_folder_is_refused_by_name(tmp_path: Path, name: str, target: str) -> None:
    folder = model_folder(tmp_path / "m")
    (folder / "notes").mkdir()
    (tmp_path / "m-other").mkdir()  # a common prefix is no folder
    for private in (tmp_path / "private", tmp_path / "m-other" / "private"):
        private.write_text("secret")
    link(folder / name, target.format(root=tmp_path))
    with pytest.raises(CheckpointError, match="out of the model's folder") as caught:
        companions(folder)
    assert name in caught.value.message
    assert "private" in caught.value.message


def test_a_link_that_passes_through_the_folder_counts_by_where_it_ends(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    (tmp_path / "private").write_text("secret")
    link(folder / "notes.txt", "../private")
    link(folder / "LICENSE", "notes.txt")
    with pytest.raises(CheckpointError, match="out of the model's folder"):
        companions(folder)


@pytest.mark.parametrize("target", ["nowhere", "LICENSE"], ids=["dangling", "loop"])
def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path, target: str) -> None:
    folder = model_folder(tmp_path / "m")
    link(folder / "LICENSE", target)
    with pytest.raises(CheckpointError, match="leads nowhere"):
        companions(folder)


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    os.mkfifo(folder / "tokenizer.pipe")
    with pytest.raises(CheckpointError, match=r"tokenizer\.pipe: is no plain file"):
        companions(folder)


def test_a_snapshot_of_the_hubs_cache_may_link_into_its_own_blobs_alone(tmp_path: Path) -> None:
    hub = tmp_path / "hub/models--owner--name"
    snapshot = model_folder(hub / "snapshots" / ("0" * 40))
    (hub / "blobs").mkdir()
    (hub / "blobs" / "abc").write_text("of the model")
    link(snapshot / "LICENSE", "../../blobs/abc")
    (tmp_path / "latest").symlink_to(snapshot, target_is_directory=True)
    for path in (snapshot, tmp_path / "latest"):
        assert "LICENSE" in {file.name for file in companions(path)}
    for other in (hub / "refs" / "main", tmp_path / "hub/models--owner--other/blobs/abc", hub / "blobs-of-mine" / "x"):
        other.parent.mkdir(parents=True)
        other.write_text("of something else")
        link(snapshot / "LICENSE", other)
        with pytest.raises(CheckpointError, match="out of the model's folder"):
            companions(snapshot)


def test_blobs_beside_a_folder_that_is_no_snapshot_are_none(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "models" / "m" / "n")
    (tmp_path / "models" / "blobs").mkdir()
    (tmp_path / "models" / "blobs" / "abc").write_text("of something else")
    link(folder / "LICENSE", "../../blobs/abc")
    with pytest.raises(CheckpointError, match="out of the model's folder"):
        companions(folder)


# sha256sum -c and our own reader split lists at each of these; the last is no UTF-8.
BAD_NAMES = ["a\nb", "a\rb", "a\x0bb", "a\x85b", "a\u2028b", "a\x1bb", os.fsdecode(b"a\xffb")]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_no_list_can_hold_is_refused(tmp_path: Path, name: str) -> None:
    folder = model_folder(tmp_path / "m")
    (folder / f"tokenizer{name}").touch()
    with pytest.raises(CheckpointError, match="no list of checksums can") as caught:
        companions(folder)
    caught.value.message.encode()


def quiet(**options: Any) -> dict[str, Any]:
    return {"progress": lambda *_: None, "log": lambda _: None, **options}


@pytest.mark.parametrize("name", [BAD_NAMES[0], BAD_NAMES[-1]], ids=["newline", "no UTF-8"])
def test_a_folder_of_such_a_name_is_refused_before_any_work(moe: Path, tmp_path: Path, name: str) -> None:
    model, out = Path(shutil.copytree(moe, tmp_path / name)), tmp_path / "out"
    text = TextSettings(tokens=128, sequence_length=32)
    recipe = parse_gguf_recipe({"format": "gguf", "type": "Q8_0"}, "here")
    attempts: list[Callable[[], object]] = [
        lambda: build(model, out, small_recipe()),
        lambda: quantize_gguf(model, out, recipe, **quiet()),
        lambda: write_model_imatrix(model, out, text, **quiet()),
        lambda: identify(model),
    ]
    for attempt in attempts:
        with pytest.raises(UsageError, match="no report can") as caught:
            attempt()
        caught.value.message.encode()
        assert not out.exists()


def test_a_private_file_gets_into_no_build(moe_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "private").write_text("{{ 'secret' }}")
    link(moe_copy / "chat_template.jinja", tmp_path / "private")
    recipe = parse_gguf_recipe({"format": "gguf", "type": "Q8_0"}, "here")
    attempts: list[Callable[[], object]] = [
        lambda: build(moe_copy, tmp_path / "out", small_recipe()),
        lambda: quantize_gguf(moe_copy, tmp_path / "out", recipe, **quiet()),
    ]
    for attempt in attempts:
        with pytest.raises(CheckpointError, match=r"chat_template\.jinja: is a link out of the model's folder"):
            attempt()
        assert not (tmp_path / "out").exists()


def test_a_name_that_leaves_no_room_for_its_file_is_refused_before_any_work(
    moe: Path, tmp_path: Path, edit_json: Callable[..., None]
) -> None:
    model = Path(shutil.copytree(moe, tmp_path / ("n" * 250)))  # with -Q8_0.gguf more than the 255 that there are
    edit_json(model / "config.json", norm_topk_prob=True)  # llama.cpp knows nothing else
    recipe = parse_gguf_recipe({"format": "gguf", "type": "Q8_0"}, "here")
    with pytest.raises(UsageError, match="too long for a file's name"):
        quantize_gguf(model, tmp_path / "out", recipe, **quiet())


def test_all_chat_templates_travel_and_a_restart_replaces_them(moe: Path, tmp_path: Path) -> None:
    """The default one has a file of its own, the others a folder."""
    source = Path(shutil.copytree(moe, tmp_path / "source"))
    folder = source / ADDITIONAL_FOLDER
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("one")
    before = identify(source).tokenizer_sha256
    out = build(source, tmp_path / "out", small_recipe()).out
    assert load_tokenizer(out).chat_template == load_tokenizer(source).chat_template
    assert load_tokenizer(out).chat_template["tool_use"] == "one"
    assert f"{ADDITIONAL_FOLDER}/tool_use.jinja" in parse_checksums((out / CHECKSUMS_NAME).read_text())
    assert verify(out).problems == []
    (folder / "tool_use.jinja").rename(folder / "rag.jinja")
    assert identify(source).tokenizer_sha256 != before
    build(source, out, small_recipe(), restart=True)
    assert [file.name for file in (out / ADDITIONAL_FOLDER).iterdir()] == ["rag.jinja"]


def test_a_template_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    (tmp_path / "private.jinja").write_text("secret")
    (folder / ADDITIONAL_FOLDER).mkdir()
    link(folder / ADDITIONAL_FOLDER / "rag.jinja", tmp_path / "private.jinja")
    with pytest.raises(CheckpointError, match=r"rag\.jinja"):
        companions(folder)


def test_a_kimi_is_calibrated_built_and_run_with_the_tokenizer_that_it_has(tmp_path: Path) -> None:
    """Ranks and code travel with the build; nothing of the code is run."""
    model = save_model(
        random_model("deepseek_v3", **EXPERTS | LATENT, num_hidden_layers=2, vocab_size=ROWS), tmp_path / "model"
    )
    (model / "tokenizer.json").unlink()
    save_kimi(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "kimi_k2"}))
    out = build(model, tmp_path / "out", small_recipe("gptq", "w4a16")).out
    for name in ("tiktoken.model", "tokenization_kimi.py", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    assert verify(out, against=model).problems == []
    assert load_tokenizer(out)("中文 abc").input_ids == load_tokenizer(model)("中文 abc").input_ids
