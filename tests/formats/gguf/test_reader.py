"""A model on disk: whole, split, incomplete, mixed up."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest
import torch

from qconv.artifacts.source import Source
from qconv.errors import CheckpointError
from qconv.formats.gguf.reader import GgufModel, split_paths
from tests.formats.gguf.conftest import Write, gguf_bytes, key, text


def test_a_set_is_opened_by_any_of_its_files_or_its_folder(write_gguf: Write) -> None:
    plan, files = write_gguf("Q8_0", max_split_size=200_000)
    assert len(files) >= 3
    models = [GgufModel.open(path) for path in (files[0], files[-1], files[0].parent)]
    for model in models:
        assert list(model.files) == files
        assert list(model.entries) == list(plan.tensors)
        assert model.metadata["general.architecture"] == "qwen3moe"
        assert not any(key.startswith("split.") for key in model.metadata)


def test_a_missing_split_is_named(write_gguf: Write) -> None:
    _, files = write_gguf("Q8_0", max_split_size=200_000)
    files[1].unlink()
    for path in (files[0], files[1], files[0].parent):
        with pytest.raises(CheckpointError, match=f"1 of {len(files)} splits missing: {files[1].name}"):
            GgufModel.open(path)


def test_a_split_under_another_number_is_found(write_gguf: Write) -> None:
    _, files = write_gguf("Q8_0", max_split_size=200_000)
    shutil.copyfile(files[0], files[1])
    with pytest.raises(CheckpointError, match=rf"{files[1].name}: says its split is 0, it is 1"):
        GgufModel.open(files[0])


def test_a_split_of_another_set_is_found(write_gguf: Write) -> None:
    _, files = write_gguf("Q8_0", max_split_size=200_000)
    _, others = write_gguf("Q8_0", "other", max_split_size=60_000)
    shutil.copyfile(others[1], files[1])
    with pytest.raises(CheckpointError, match="says its number of splits"):
        GgufModel.open(files[0])


def test_a_tensor_in_two_splits_is_found(write_gguf: Write) -> None:
    plan, files = write_gguf("Q8_0", max_split_size=200_000)
    first, second = ([info.name.encode() for info in layout.tensors] for layout in plan.files[:2])
    there, here = next((one, other) for one in first for other in second if len(one) == len(other))
    files[1].write_bytes(files[1].read_bytes().replace(here, there))
    with pytest.raises(CheckpointError, match=f"{files[1].name}: tensor '{there.decode()}' is also in"):
        GgufModel.open(files[0])


def test_a_split_with_too_few_tensors_is_found(write_gguf: Write) -> None:
    _, files = write_gguf("Q8_0", max_split_size=200_000)
    keys = [
        key("split.no", 2, struct.pack("<H", 1)),
        key("split.count", 2, struct.pack("<H", len(files))),
        key("split.tensors.count", 5, struct.pack("<i", 27)),
    ]
    files[1].write_bytes(gguf_bytes(keys))
    with pytest.raises(CheckpointError, match="says its set's number of tensors is 27"):
        GgufModel.open(files[0])


def test_a_renamed_split_is_found(write_gguf: Write) -> None:
    _, files = write_gguf("Q8_0", max_split_size=200_000)
    alone = files[0].rename(files[0].with_name("model.gguf"))
    with pytest.raises(CheckpointError, match="says its number of splits"):
        GgufModel.open(alone)


def test_impossible_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no split 4 of 3"):
        split_paths(tmp_path / "model-00004-of-00003.gguf")
    assert split_paths(tmp_path / "model-1-of-2.gguf") == [tmp_path / "model-1-of-2.gguf"]


def test_a_folder_holds_one_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no GGUF file"):
        GgufModel.open(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(gguf_bytes())
    with pytest.raises(CheckpointError, match=r"holds several models: a\.gguf, b\.gguf"):
        GgufModel.open(tmp_path)
    # An importance matrix may lie beside a model, under any name.
    (tmp_path / "b.gguf").write_bytes(gguf_bytes([key("general.type", 8, text("imatrix"))]))
    assert GgufModel.open(tmp_path).files == (tmp_path / "a.gguf",)
    (tmp_path / "a.gguf").write_bytes((tmp_path / "b.gguf").read_bytes())
    with pytest.raises(CheckpointError, match="holds importance matrices and no model"):
        GgufModel.open(tmp_path)


def test_values_are_those_of_the_source(write_gguf: Write, expressible: Path) -> None:
    _, (path,) = write_gguf("BF16")  # loses nothing of a bf16 checkpoint
    model, source = GgufModel.open(path), Source.open(expressible)
    down = torch.cat(list(model.dequantized("blk.1.ffn_down_exps.weight"))).view(6, 64, 32)
    for expert in range(6):
        weight = source.read(f"model.layers.1.mlp.experts.{expert}.down_proj.weight")
        assert torch.equal(down[expert], weight.float())
    norm = torch.cat(list(model.dequantized("output_norm.weight")))
    assert torch.equal(norm, source.read("model.norm.weight").float()[None])


def test_an_absent_tensor_is_named(write_gguf: Write) -> None:
    _, (path,) = write_gguf("F16")
    with pytest.raises(CheckpointError, match=r"no tensor 'blk\.9\.attn_q\.weight'"):
        next(GgufModel.open(path).blocks("blk.9.attn_q.weight"))
