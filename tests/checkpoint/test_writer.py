"""The shard writer: what it publishes the safetensors library reads, and what goes wrong leaves nothing behind."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from qconv.checkpoint import writer
from qconv.checkpoint.header import DTYPES, TensorSpec
from qconv.checkpoint.writer import ShardWriter, output_errors, sha256_of, write_atomically
from qconv.errors import OutputError, VerificationError

SPECS = [TensorSpec("a", torch.float32, (4, 3)), TensorSpec("b", torch.bfloat16, (5,))]
TENSORS = {"a": torch.arange(12.0).view(4, 3), "b": torch.arange(5.0).bfloat16()}


def write_all(path: Path) -> ShardWriter:
    """A writer that was given every tensor."""
    shard = ShardWriter(path, SPECS)
    for name, tensor in TENSORS.items():
        shard.write(name, tensor)
    return shard


def write_and_finish(path: Path, tensors: dict[str, Tensor], specs: list[TensorSpec]) -> None:
    """The whole life of a shard but its publication."""
    with ShardWriter(path, specs) as shard:
        for name, tensor in tensors.items():
            shard.write(name, tensor)
        shard.finish()


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 6), max_size=3)), min_size=1, max_size=5
    ),
    st.integers(1, 4),
)
def test_the_library_reads_what_was_written_in_blocks_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, described: list[tuple[str, list[int]]], block_rows: int
) -> None:
    generator = torch.Generator().manual_seed(block_rows)
    specs = [TensorSpec(f"t.{n}", DTYPES[dtype], tuple(shape)) for n, (dtype, shape) in enumerate(described)]
    path = tmp_path_factory.mktemp("writer") / "a.safetensors"
    written: dict[str, Tensor] = {}
    with ShardWriter(path, specs) as shard:
        for spec in specs:
            # Bits 0 and 1 alone: NaNs of the float types would not compare equal, and a bool holds nothing else.
            raw = torch.randint(0, 2, (*spec.shape, spec.dtype.itemsize), generator=generator, dtype=torch.uint8)
            written[spec.name] = raw.view(spec.dtype).reshape(spec.shape)
            blocks = torch.split(written[spec.name], block_rows) if spec.shape else (written[spec.name],)
            shard.write_blocks(spec.name, blocks)
        record = shard.commit()
    assert (record.name, record.size) == (path.name, path.stat().st_size)
    assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    found = load_file(path)
    assert found.keys() == written.keys()
    for name, tensor in written.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_a_tensor_that_is_not_contiguous_is_written_in_its_own_order(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).view(3, 4).t()
    with ShardWriter(tmp_path / "a.safetensors", SPECS[:1]) as shard:
        shard.write("a", tensor)
        shard.commit()
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], tensor)


def test_nothing_has_the_final_name_before_publish(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with write_all(path) as shard:
        record = shard.finish()
        assert not path.exists()
        shard.publish()
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    assert record.sha256 == sha256_of(path)


@pytest.mark.parametrize("steps", ["nothing", "one tensor", "all", "finished"])
def test_leaving_before_publish_leaves_no_file(tmp_path: Path, steps: str) -> None:
    with ShardWriter(tmp_path / "a.safetensors", SPECS) as shard:
        if steps != "nothing":
            shard.write("a", TENSORS["a"])
        if steps in ("all", "finished"):
            shard.write("b", TENSORS["b"])
        if steps == "finished":
            shard.finish()
    assert list(tmp_path.iterdir()) == []


WRONG: dict[str, tuple[str, list[Tensor]]] = {
    "order": ("b", [TENSORS["b"]]),
    "dtype": ("a", [TENSORS["a"].double()]),
    "same size, other dtype": ("a", [TENSORS["a"].view(torch.int32)]),
    "transposed": ("a", [TENSORS["a"].t()]),
    "flat": ("a", [TENSORS["a"].flatten()]),
    "too few rows": ("a", [TENSORS["a"][:3]]),
    "too many rows": ("a", [TENSORS["a"], TENSORS["a"]]),
    "no blocks": ("a", []),
}


@pytest.mark.parametrize("case", WRONG)
def test_anything_but_the_announced_tensor_is_refused(tmp_path: Path, case: str) -> None:
    name, blocks = WRONG[case]
    with ShardWriter(tmp_path / "a.safetensors", SPECS) as shard, pytest.raises(ValueError, match=name):
        shard.write_blocks(name, blocks)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_cannot_be_finished_early_or_go_on_late(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.safetensors", SPECS) as shard:
        with pytest.raises(ValueError, match="2 tensors were not written"):
            shard.finish()
        for name, tensor in TENSORS.items():
            shard.write(name, tensor)
        with pytest.raises(ValueError, match="complete"):
            shard.write("a", TENSORS["a"])


def test_bytes_that_change_on_disk_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def corrupt(path: Path) -> str:
        content = bytearray(path.read_bytes())
        content[-3] ^= 4
        path.write_bytes(content)
        return sha256_of(path)

    monkeypatch.setattr(writer, "sha256_of", corrupt)
    with write_all(tmp_path / "a.safetensors") as shard, pytest.raises(VerificationError, match="read back differs"):
        shard.finish()
    assert list(tmp_path.iterdir()) == []


def full(path: Path) -> Path:
    """A shard's path whose temporary file is a disk without room."""
    path.with_name(path.name + ".partial").symlink_to("/dev/full")
    return path


def test_a_full_disk_is_named_and_nothing_stays(tmp_path: Path) -> None:
    path = full(tmp_path / "a.safetensors")
    with write_all(path) as shard, pytest.raises(OutputError, match="the disk is full") as caught:
        shard.finish()
    assert str(path) in caught.value.message
    assert "Free some space" in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_full_for_the_header_leaves_nothing_either(tmp_path: Path) -> None:
    path = full(tmp_path / "a.safetensors")
    # Beyond the writer's two buffers of 8 MiB each.
    many = [TensorSpec(f"tensor.{number:06d}", torch.int8, (1,)) for number in range(240_000)]
    with pytest.raises(OutputError, match="the disk is full"), ShardWriter(path, many):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_real_disk_that_runs_full(small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(1 << 20)
    specs = [TensorSpec(f"w{number}", torch.uint8, (1 << 18,)) for number in range(8)]
    with pytest.raises(OutputError, match="the disk is full"):
        write_and_finish(disk / "a.safetensors", {spec.name: torch.zeros(spec.shape).byte() for spec in specs}, specs)
    assert list(disk.iterdir()) == []


def test_a_disk_that_reports_itself_full_at_the_sync_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OutputError, match="the disk is full"):
        write_and_finish(tmp_path / "a.safetensors", TENSORS, SPECS)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"absent/a\.safetensors: cannot write: No such file"):
        ShardWriter(tmp_path / "absent/a.safetensors", SPECS)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_quota_is_a_full_disk(code: int) -> None:
    with pytest.raises(OutputError, match="the disk is full"), output_errors(Path("x")):
        raise OSError(code, os.strerror(code))


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(KeyError), output_errors(Path("x")):
        raise KeyError("x")


def test_an_atomic_write_replaces_the_file_or_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match=r"config\.json: the disk is full"):
        write_atomically(path, b"torn")
    assert path.read_bytes() == b"new"
