"""Checkpoint folders: index against shards, tensors mapped and let go, damage found and named."""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from qconv.checkpoint import reader
from qconv.checkpoint.header import read_header
from qconv.checkpoint.maps import SharedMaps
from qconv.checkpoint.reader import INDEX_NAME, SINGLE_NAME, Checkpoint, read_json, require_finite
from qconv.errors import CheckpointError

TENSORS: dict[str, dict[str, Tensor]] = {
    "model-1.safetensors": {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4, dtype=torch.int16)},
    "model-2.safetensors": {"c": torch.arange(10.0).bfloat16(), "d": torch.tensor(3.5), "e": torch.empty(0, 4)},
}


def write_folder(folder: Path, shards: dict[str, dict[str, Tensor]], weight_map: dict[str, Any] | None = None) -> Path:
    """A checkpoint folder written by the safetensors library."""
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard)
    if weight_map is None:
        weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "anything"}')
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two sound shards and their index."""
    return write_folder(tmp_path, TENSORS)


def change_index(folder: Path, **changes: Any) -> None:
    """Replace entries of the weight map; None removes one."""
    index = json.loads((folder / INDEX_NAME).read_text())
    weight_map = {**index["weight_map"], **changes}
    index["weight_map"] = {name: shard for name, shard in weight_map.items() if shard is not None}
    (folder / INDEX_NAME).write_text(json.dumps(index))


def test_every_tensor_is_read_as_the_library_wrote_it(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config == {"model_type": "anything"}
    assert [path.name for path in checkpoint.files] == list(TENSORS)
    written = {name: tensor for shard in TENSORS.values() for name, tensor in shard.items()}
    assert checkpoint.entries.keys() == written.keys()
    for name, tensor in written.items():
        found = checkpoint.read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found, tensor)


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / SINGLE_NAME)
    (tmp_path / "config.json").write_text("{}")
    assert torch.equal(Checkpoint.open(tmp_path).read("a"), torch.ones(3))


def test_writing_to_a_tensor_changes_no_file(folder: Path) -> None:
    before = (folder / "model-1.safetensors").read_bytes()
    checkpoint = Checkpoint.open(folder)
    checkpoint.read("a").fill_(-1.0)
    assert (folder / "model-1.safetensors").read_bytes() == before
    assert torch.equal(checkpoint.read("a"), TENSORS["model-1.safetensors"]["a"])


def test_an_unknown_tensor_is_named(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor 'absent'"):
        Checkpoint.open(folder).read("absent")


INDEX_FAULTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "missing shard": ({"x": "model-3.safetensors"}, ("1 of 3 shards missing", "model-3.safetensors")),
    "placed in another shard": (
        {"b": "model-2.safetensors"},
        ("model-1.safetensors", "'b'", "places in 'model-2.safetensors'"),
    ),
    "not in the index": ({"b": None}, ("model-1.safetensors", "'b'", "places in no file")),
    "not in the shard": ({"x": "model-2.safetensors"}, ("model-2.safetensors", "lacks tensor 'x'")),
    "parent folder": ({"x": "../model-1.safetensors"}, ("'x'", "not a file name")),
    "absolute path": ({"x": "/etc/passwd"}, ("'x'", "not a file name")),
    "sub folder": ({"x": "sub/model-1.safetensors"}, ("'x'", "not a file name")),
    "dots": ({"x": ".."}, ("..",)),
    "a number": ({"x": 3}, ("'x'", "not a file name")),
    "a list": ({"x": ["model-1.safetensors"]}, ("'x'", "not a file name")),
    "empty name": ({"x": ""}, ("'x'", "not a file name")),
    "zero byte": ({"x": "a\0"}, ("'x'", "not a file name")),
    "null": ({"x": "/dev/zero"}, ("'x'", "not a file name")),
}


def test_a_single_file_beside_an_index_of_others_is_two_models(folder: Path) -> None:
    save_file({"a": torch.ones(3)}, folder / SINGLE_NAME)
    with pytest.raises(CheckpointError, match="two models") as caught:
        Checkpoint.open(folder)
    assert caught.value.hint is not None
    assert SINGLE_NAME in caught.value.hint
    assert INDEX_NAME in caught.value.hint


def test_an_index_may_name_the_single_file(tmp_path: Path) -> None:
    write_folder(tmp_path, {SINGLE_NAME: {"a": torch.ones(3)}})
    assert torch.equal(Checkpoint.open(tmp_path).read("a"), torch.ones(3))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "index"),
        (["weights.safetensors"], "Name it model.safetensors"),
        (["m-Q8_0.GGUF", "tokenizer.json"], "GGUF"),
        (["pytorch_model.bin"], "pickled"),
        (["tokenizer.json"], "finish the download"),
    ],
)
def test_a_folder_without_weights_says_what_there_is(tmp_path: Path, files: list[str], said: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in files:
        (tmp_path / name).write_bytes(b"GGUF" if name.endswith("GGUF") else b"{}")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors\.index\.json") as caught:
        Checkpoint.open(tmp_path)
    assert said in str(caught.value)
    assert ("pickled" in str(caught.value)) == ("pytorch_model.bin" in files)


def test_a_tensor_whose_elements_share_bytes_is_not_read(folder: Path) -> None:
    header = {"q": {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    (folder / "model-3.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    change_index(folder, q="model-3.safetensors")
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.entry("q").dtype_name == "F4"
    with pytest.raises(CheckpointError, match="'q' is F4"):
        checkpoint.read("q")
    with pytest.raises(CheckpointError, match="'q' is F4"):
        SharedMaps()(checkpoint.entry("q"))


@pytest.mark.parametrize("case", INDEX_FAULTS)
def test_a_wrong_index_is_refused(folder: Path, case: str) -> None:
    changes, parts = INDEX_FAULTS[case]
    change_index(folder, **changes)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    for part in (*parts, str(folder)):
        assert part in caught.value.message


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    shards = {"1.safetensors": {"a": torch.ones(1)}, "2.safetensors": {"a": torch.ones(1), "b": torch.ones(1)}}
    write_folder(tmp_path, shards, {"a": "1.safetensors", "b": "2.safetensors"})
    with pytest.raises(CheckpointError, match=r"'a' is in both 1\.safetensors and 2\.safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "[]", "{", "\x00"])
def test_a_broken_index_is_refused(folder: Path, text: str) -> None:
    (folder / INDEX_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=INDEX_NAME):
        Checkpoint.open(folder)


def test_pickled_checkpoints_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="neither") as caught:
        Checkpoint.open(tmp_path)
    assert "pickled" in str(caught.value)


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", b"", b"[" * 100_000])
def test_broken_json_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_json(path)


@given(
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
    rows=st.integers(1, 5),
    columns=st.integers(1, 40),
    data=st.data(),
)
def test_the_first_value_that_is_not_finite_is_named_by_position(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: torch.dtype,
    value: float,
    rows: int,
    columns: int,
    data: st.DataObject,
) -> None:
    limit = torch.finfo(dtype).max  # finite, though its row's sum is not
    tensor = torch.full((rows, columns), limit).to(dtype)
    path = tmp_path_factory.mktemp("nan") / "a.safetensors"
    save_file({"w": tensor}, path)
    entry = read_header(path)["w"]
    assert require_finite(tensor, entry) is tensor
    picks = data.draw(
        st.lists(st.tuples(st.integers(0, rows - 1), st.integers(0, columns - 1)), min_size=1, max_size=3, unique=True)
    )
    for row, column in picks:
        tensor[row, column] = value
    with pytest.raises(CheckpointError) as caught:
        require_finite(tensor, entry)
    message = caught.value.message
    assert f"'w' holds {len(picks)} values that are not finite, the first at {list(min(picks))}" in message
    assert str(path) in message


def test_opposite_infinities_do_not_cancel(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "a.safetensors")
    entry = read_header(tmp_path / "a.safetensors")["w"]
    with pytest.raises(CheckpointError, match="2 values"):
        require_finite(torch.tensor([math.inf, -math.inf]), entry)


def test_tensors_that_are_not_aligned_are_read(tmp_path: Path) -> None:
    values = torch.arange(5.0)
    header = json.dumps(
        {
            "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
            "w": {"dtype": "F32", "shape": [5], "data_offsets": [3, 23]},
        }
    ).encode()
    content = struct.pack("<Q", len(header)) + header + b"\1\2\3" + values.numpy().tobytes()
    (tmp_path / SINGLE_NAME).write_bytes(content)
    (tmp_path / "config.json").write_text("{}")
    entry = read_header(tmp_path / SINGLE_NAME)["w"]
    assert entry.offset % 4, "the case that is tested"
    assert torch.equal(Checkpoint.open(tmp_path).read("w"), values)


def mappings(path: Path) -> int:
    """How often this process has a file mapped."""
    return sum(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())


def resident() -> int:
    """This process's resident memory in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_a_mapping_lives_as_long_as_its_tensor(folder: Path) -> None:
    path = folder / "model-1.safetensors"
    checkpoint = Checkpoint.open(folder)
    assert mappings(path) == 0, "opening maps nothing"
    tensor = checkpoint.read("a")
    row = tensor[1]
    assert mappings(path) == 1
    del tensor
    assert row.tolist() == [3.0, 4.0, 5.0]  # a view keeps the mapping
    del row
    assert mappings(path) == 0


def test_reading_many_tensors_does_not_gather_memory(tmp_path: Path) -> None:
    size = 32 * 2**20
    shards = {"big.safetensors": {f"w{number}": torch.full((size // 4,), float(number)) for number in range(4)}}
    checkpoint = Checkpoint.open(write_folder(tmp_path, shards))
    del shards
    before = resident()
    for _ in range(3):
        for number in range(4):
            tensor = checkpoint.read(f"w{number}")
            assert float(tensor.sum() / len(tensor)) == number  # touches every page
            del tensor
    assert resident() - before < size  # twelve reads of 32 MiB; one kept would show


def test_blocks_are_the_tensor_and_map_one_part_each(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr(reader, "BLOCK_BYTES", 5 * 7 * 4)  # five rows
    tensors = {"w": torch.arange(13 * 7.0).view(13, 7), "scalar": torch.tensor(1.0), "wide": torch.ones(2, 100)}
    checkpoint = Checkpoint.open(write_folder(tmp_path_factory.mktemp("blocks"), {"1.safetensors": tensors}))
    blocks = list(checkpoint.blocks("w"))
    assert [len(block) for block in blocks] == [5, 5, 3]
    assert torch.equal(torch.cat(blocks), tensors["w"])
    assert [block.shape for block in checkpoint.blocks("scalar")] == [()]
    assert [tuple(block.shape) for block in checkpoint.blocks("wide")] == [(1, 100)] * 2  # at least one row at a time
    for multiple, sizes in ((2, [4, 4, 4, 1]), (5, [5, 5, 3]), (6, [6, 6, 1]), (20, [13])):
        blocks = list(checkpoint.blocks("w", multiple))
        assert [len(block) for block in blocks] == sizes
        assert torch.equal(torch.cat(blocks), tensors["w"])


def test_a_file_that_shrinks_during_the_run_is_an_error_and_no_crash(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    with (folder / "model-2.safetensors").open("r+b") as file:
        file.truncate(64)
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors: cannot read tensor 'c'"):
        checkpoint.read("c")
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors: cannot read tensor 'a'"):
        checkpoint.read("a")


def test_the_fingerprint_tells_weights_names_and_config_apart(tmp_path: Path) -> None:
    def fingerprint(tensors: dict[str, Tensor], config: str = "{}", name: str = "1.safetensors") -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        write_folder(folder, {name: tensors})
        (folder / "config.json").write_text(config)
        return Checkpoint.open(folder).fingerprint()

    weights = torch.arange(1000.0)
    same = fingerprint({"w": weights})
    assert fingerprint({"w": weights}) == same
    assert fingerprint({"w": weights}, "{\n}") == same  # white space means nothing
    others = [
        fingerprint({"w": weights + 1}),
        fingerprint({"v": weights}),
        fingerprint({"w": weights.view(10, 100)}),
        fingerprint({"w": weights}, '{"a": 1}'),
        fingerprint({"w": weights}, name="2.safetensors"),
    ]
    assert len({same, *others}) == 1 + len(others)


@given(st.integers(0, 10**6 - 1))
def test_the_fingerprint_of_a_small_shard_covers_nearly_all_of_it(
    tmp_path_factory: pytest.TempPathFactory, position: int
) -> None:
    # 64 samples of 4096 bytes: up to 256 KiB every byte counts.
    size = 64 * 4096 - 4096
    folder = tmp_path_factory.mktemp("fingerprint")
    weights = torch.zeros(size, dtype=torch.uint8)
    write_folder(folder, {"1.safetensors": {"w": weights}})
    before = Checkpoint.open(folder).fingerprint()
    weights[position % size] = 1
    save_file({"w": weights}, folder / "1.safetensors")
    assert Checkpoint.open(folder).fingerprint() != before


def test_a_disk_that_cannot_read_is_an_error_and_no_signal(folder: Path) -> None:
    """A mapping whose pages cannot be had ends the process at the first access; it must be refused before."""
    path = folder / "model-1.safetensors"
    path.write_bytes(path.read_bytes().ljust(3 * mmap.PAGESIZE, b"\0"))
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 3 * mmap.PAGESIZE, access=mmap.ACCESS_COPY)
    os.truncate(path, 100)
    with pytest.raises(OSError, match=r"."):
        reader.populate(view)


@given(rows=st.lists(st.integers(0, 1), max_size=6))
def test_gathered_rows_are_the_tensors_rows(tmp_path_factory: pytest.TempPathFactory, rows: list[int]) -> None:
    checkpoint = Checkpoint.open(write_folder(tmp_path_factory.mktemp("gather"), TENSORS))
    index = torch.tensor(rows, dtype=torch.int64)
    assert torch.equal(checkpoint.gather("a", index), TENSORS["model-1.safetensors"]["a"][index])
