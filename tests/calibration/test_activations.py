"""Activation files: rows go in and come out, rounded once, and nothing stays mapped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qconv.calibration.activations import ActivationFile, ResidentActivations, SetAside
from qconv.errors import OutputError
from tests import accelerator

DTYPES = [torch.bfloat16, torch.float32]


@given(
    dtype=st.sampled_from(DTYPES),
    tokens=st.integers(1, 300),
    width=st.sampled_from([1, 7, 64, 1500]),  # rows that do not end at page borders
    data=st.data(),
)
def test_any_window_reads_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, tokens: int, width: int, data: st.DataObject
) -> None:
    file = ActivationFile(tmp_path_factory.mktemp("activations") / "a.bin", tokens, width, dtype).create()
    assert file.path.stat().st_size == file.nbytes == tokens * width * dtype.itemsize
    assert not bool(file.read(0, tokens).any()), "a new file is zero"
    rows = torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens))
    cut = data.draw(st.integers(0, tokens))
    for start, stop in ((cut, tokens), (0, cut)):
        if start < stop:
            file.write(start, rows[start:stop])
    stored = rows.to(dtype).float()
    start = data.draw(st.integers(0, tokens - 1))
    stop = data.draw(st.integers(start + 1, tokens))
    found = file.read(start, stop)
    assert found.dtype == torch.float32
    assert torch.equal(found, stored[start:stop])
    index = torch.tensor(data.draw(st.lists(st.integers(0, tokens - 1), max_size=8)), dtype=torch.int64)
    assert torch.equal(file.gather(index), stored[index])
    assert file.path.read_bytes() == rows.to(dtype).view(torch.uint8).numpy().tobytes()
    assert file.seal() == hashlib.sha256(file.path.read_bytes()).hexdigest()


def test_adding_touches_the_chosen_rows_alone(tmp_path: Path) -> None:
    file = ActivationFile(tmp_path / "a.bin", 5, 3, torch.float32).create()
    file.write(0, torch.ones(5, 3))
    file.add(torch.tensor([1, 4]), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    file.add(torch.tensor([], dtype=torch.int64), torch.empty(0, 3))
    assert file.read(0, 5).tolist() == [[1, 1, 1], [2, 3, 4], [1, 1, 1], [1, 1, 1], [5, 6, 7]]


def test_what_was_read_is_a_copy(tmp_path: Path) -> None:
    for dtype in DTYPES:
        file = ActivationFile(tmp_path / "a.bin", 2, 2, dtype).create()
        file.read(0, 2).fill_(7.0)
        file.gather(torch.tensor([0])).fill_(7.0)
        assert not bool(file.read(0, 2).any())


def test_windows_cover_every_row_once(tmp_path: Path) -> None:
    file = ActivationFile(tmp_path / "a.bin", 10, 1, torch.float32)
    assert list(file.windows(4)) == [(0, 4), (4, 8), (8, 10)]
    assert list(file.windows(100)) == [(0, 10)]


def test_no_access_stays_mapped(tmp_path: Path) -> None:
    file = ActivationFile(tmp_path / "a.bin", 100, 100, torch.float32).create()
    file.write(3, torch.ones(4, 100))
    kept = [file.read(0, 50), file.gather(torch.tensor([3]))]
    file.add(torch.tensor([3]), torch.ones(1, 100))
    assert str(file.path) not in Path("/proc/self/maps").read_text()
    assert len(kept) == 2


def test_a_full_disk_shows_when_the_file_is_made(small_disk: Callable[[int], Path]) -> None:
    file = ActivationFile(small_disk(1 << 16) / "a.bin", 1000, 1000, torch.float32)
    with pytest.raises(OutputError, match=r"a\.bin: the disk is full"):
        file.create()


def test_a_file_that_is_gone_is_an_error(tmp_path: Path) -> None:
    file = ActivationFile(tmp_path / "a.bin", 1, 1, torch.float32)
    with pytest.raises(OutputError, match=r"a\.bin"):
        file.read(0, 1)
    with pytest.raises(OutputError, match=r"a\.bin"):
        file.seal()


def test_rows_set_aside_come_back_in_their_windows_and_leave_no_file(tmp_path: Path) -> None:
    windows = [(torch.arange(3) + 10 * i, torch.randn(3 + i, 1500)[:3]) for i in range(4)]
    windows.append((torch.tensor([], dtype=torch.int64), torch.empty(0, 1500)))
    aside = SetAside(tmp_path, 1500, iter(windows))
    assert list(tmp_path.iterdir()) == [], "the file has no name, so that no kill can leave it behind"
    for _ in range(2):
        found = list(aside)
        assert len(found) == len(windows)
        for (tokens, rows), (expected_tokens, expected_rows) in zip(found, windows, strict=True):
            assert torch.equal(tokens, expected_tokens)
            assert torch.equal(rows, expected_rows)


def test_setting_aside_in_a_folder_that_is_gone_says_so(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="gone"):
        SetAside(tmp_path / "gone", 4, [(torch.arange(1), torch.zeros(1, 4))])


@given(
    tokens=st.integers(2, 40),
    dtype=st.sampled_from(DTYPES),
    halves=st.booleans(),
    here=st.sampled_from(["cpu", "emu:0", "emu:1"]),
)
def test_a_device_s_memory_does_what_a_file_does(
    tmp_path_factory: pytest.TempPathFactory, tokens: int, dtype: torch.dtype, halves: bool, here: str
) -> None:
    accelerator.load()
    generator, device = torch.Generator().manual_seed(tokens), torch.device(here)
    path = tmp_path_factory.mktemp("activations") / "a.bin"
    file = ActivationFile(path, tokens, 5, dtype).create()
    resident: ActivationFile = ResidentActivations(ActivationFile(path, tokens, 5, dtype), torch.device("emu:0"))
    assert bool(resident.read(0, tokens).isnan().all()), "nothing is there yet"
    rows = torch.randn(tokens, 5, generator=generator)
    index = torch.randperm(tokens, generator=generator)[: tokens // 2].sort().values
    found = []
    for one in (file, resident):
        one.create().write(0, rows.to(device))
        whole, one = one, one.part(tokens // 2, tokens - tokens // 2) if halves else one
        picked = index[index < one.tokens]
        one.add(picked, rows[: len(picked)].to(device))
        read = [
            one.read(one.tokens // 2, one.tokens, device),
            one.gather(picked, device),
            whole.read(0, tokens, device),
        ]
        assert all(tensor.device == device and tensor.dtype == torch.float32 for tensor in read)
        kept = [tensor.clone() for tensor in read]
        for tensor in read:
            tensor.zero_()  # copies
        found.append([tensor.cpu() for tensor in (*kept, whole.read(0, tokens))])
    for ours, expected in zip(*found, strict=True):
        assert torch.equal(ours, expected)
