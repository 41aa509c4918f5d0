"""Files written as a stream: their layout, their discipline, their splits."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValue, GGUFValueType, GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from qconv.checkpoint import writer
from qconv.checkpoint.direct import DirectWriter
from qconv.errors import OutputError, UsageError, VerificationError
from qconv.formats.gguf import container
from qconv.formats.gguf.container import FileLayout, GgufWriter, TensorInfo, encode_header, lay_out
from qconv.formats.gguf.header import read_header

T = GGMLQuantizationType
METADATA = {
    "general.architecture": GGUFValue("test", GGUFValueType.STRING),
    "test.numbers": GGUFValue([1, 2, 3], GGUFValueType.ARRAY),
}
INFOS = (TensorInfo("a", T.F32, (3, 5)), TensorInfo("b", T.Q8_0, (2, 4, 32)), TensorInfo("c", T.F16, (7,)))


def data(info: TensorInfo) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(info.name) + info.nbytes)
    return torch.randint(0, 256, (info.nbytes,), generator=generator, dtype=torch.uint8)


def written(folder: Path, layout: FileLayout) -> Path:
    with GgufWriter(folder, layout) as writer:
        for info in layout.tensors:
            writer.write_blocks(info.name, torch.split(data(info), 13))
        writer.commit()
    return folder / layout.name


def test_a_file_is_byte_for_byte_what_the_gguf_package_writes(tmp_path: Path) -> None:
    path = written(tmp_path, FileLayout("ours.gguf", METADATA, INFOS))
    writer = GGUFWriter(tmp_path / "theirs.gguf", "test")
    writer.add_array("test.numbers", [1, 2, 3])
    for info in INFOS:
        raw = data(info).numpy()
        if info.type == T.Q8_0:
            writer.add_tensor(info.name, raw.reshape(2, 4, 34), raw_dtype=info.type)
        else:
            dtype = np.float32 if info.type == T.F32 else np.float16
            writer.add_tensor(info.name, raw.view(dtype).reshape(info.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert path.read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_the_record_and_the_layout_tell_the_size_and_checksum(tmp_path: Path) -> None:
    layout = FileLayout("model.gguf", METADATA, INFOS)
    writer = GgufWriter(tmp_path, layout)
    for info in INFOS:
        writer.write_blocks(info.name, [data(info)])
    record = writer.commit()
    content = (tmp_path / "model.gguf").read_bytes()
    assert (record.name, record.size) == ("model.gguf", len(content))
    assert record.sha256 == hashlib.sha256(content).hexdigest()
    assert layout.size == len(content)


def test_nothing_appears_under_the_final_name_before_it_is_whole(tmp_path: Path) -> None:
    with GgufWriter(tmp_path, FileLayout("model.gguf", METADATA, INFOS)) as writer:
        writer.write_blocks("a", [data(INFOS[0])])
        assert [file.name for file in tmp_path.iterdir()] == ["model.gguf.partial"]
        assert not writer.complete
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_file_cannot_be_sealed(tmp_path: Path) -> None:
    with (
        GgufWriter(tmp_path, FileLayout("model.gguf", METADATA, INFOS)) as writer,
        pytest.raises(ValueError, match="3 tensors were not written"),
    ):
        writer.seal()


@pytest.mark.parametrize(
    ("name", "block", "what"),
    [
        ("b", torch.zeros(60, dtype=torch.uint8), "expected a, got b"),
        ("a", torch.zeros(15), "not bytes"),
        ("a", torch.zeros(59, dtype=torch.uint8), "59 bytes, not 60"),
        ("a", torch.zeros(61, dtype=torch.uint8), "61 bytes, not 60"),
    ],
)
def test_only_the_announced_tensor_is_taken(name: str, block: torch.Tensor, what: str, tmp_path: Path) -> None:
    with (
        GgufWriter(tmp_path, FileLayout("model.gguf", METADATA, INFOS)) as writer,
        pytest.raises(ValueError, match=what),
    ):
        writer.write_blocks(name, [block])


def test_a_whole_file_takes_no_more(tmp_path: Path) -> None:
    with GgufWriter(tmp_path, FileLayout("model.gguf", METADATA, ())) as writer:
        assert writer.complete
        with pytest.raises(ValueError, match="the file is complete"):
            writer.write_blocks("a", [])


def test_what_is_read_back_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "sha256_of", lambda path: "0" * 64)
    with pytest.raises(VerificationError, match="read back differs"):
        written(tmp_path, FileLayout("model.gguf", METADATA, INFOS))
    assert list(tmp_path.iterdir()) == []


def test_a_failing_disk_is_an_error_with_the_files_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: DirectWriter, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DirectWriter, "write", fail)
    with pytest.raises(OutputError, match=r"model\.gguf: the disk is full"):
        GgufWriter(tmp_path, FileLayout("model.gguf", METADATA, INFOS))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(2**20)
    layout = FileLayout("model.gguf", METADATA, (TensorInfo("a", T.F32, (2**20,)),))
    with pytest.raises(OutputError, match="the disk is full"):
        written(disk, layout)
    assert list(disk.iterdir()) == []


def test_a_long_name_is_refused() -> None:
    with pytest.raises(UsageError, match="names of at most 63 bytes"):
        encode_header(METADATA, [TensorInfo("n" * 64, T.F32, (1,))])


def test_a_row_of_half_a_block_is_refused() -> None:
    with pytest.raises(UsageError, match="Q4_K holds blocks of 256 weights, which do not divide rows of 128"):
        encode_header(METADATA, [TensorInfo("n", T.Q4_K, (2, 128))])


@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=30),
    st.integers(1, 30000),
)
def test_splits_keep_the_order_and_the_limit(lengths: list[int], limit: int) -> None:
    tensors = [TensorInfo(f"t{number}", T.F32, (length,)) for number, length in enumerate(lengths)]
    layouts = lay_out("model", METADATA, tensors, limit)
    assert [info for layout in layouts for info in layout.tensors] == tensors
    for layout in layouts:
        assert layout.tensors
        assert len(layout.tensors) == 1 or sum(info.padded for info in layout.tensors) <= limit
    if len(layouts) == 1:
        assert layouts[0].name == "model.gguf"
        assert "split.no" not in layouts[0].metadata
        return
    for number, layout in enumerate(layouts):
        assert layout.name == f"model-{number + 1:05d}-of-{len(layouts):05d}.gguf"
        keys = {key: (value.value, value.type) for key, value in layout.metadata.items() if key.startswith("split.")}
        assert keys == {
            "split.no": (number, GGUFValueType.UINT16),
            "split.count": (len(layouts), GGUFValueType.UINT16),
            "split.tensors.count": (len(tensors), GGUFValueType.INT32),
        }
        assert ("general.architecture" in layout.metadata) == (number == 0)


def test_a_set_has_no_more_files_than_its_keys_can_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "MAX_SPLITS", 2)
    with pytest.raises(UsageError, match="3 of them, a set has at most 2"):
        lay_out("model", METADATA, INFOS, 1)


def test_a_file_of_key_values_alone_is_sound(tmp_path: Path) -> None:
    path = written(tmp_path, FileLayout("model.gguf", METADATA, ()))
    assert read_header(path).entries == {}
    assert GGUFReader(path).fields["general.architecture"].contents() == "test"
