"""What ``make gpu-check`` does, without a GPU: the same functions on the PTX interpreter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kernels.proof.launcher import PtxLauncher
from qconv.runtime.kernel_interface import TILE_BYTES
from tests.gpu.bench import Machine, Peaks, Results, environment, host_seconds, peaks
from tests.gpu.products import check_dense, check_experts, time_dense, time_experts


@pytest.fixture(scope="module")
def machine() -> Machine:
    """The CPU, with the interpreter in the place of a driver."""
    return Machine(torch.device("cpu"), PtxLauncher(90, multiprocessors=8), host_seconds)


def test_the_roofline_is_the_slower_of_memory_and_arithmetic() -> None:
    roofline = Peaks(bandwidth=1e12, flops=1e15)
    assert roofline.seconds(10**9, 1.0) == pytest.approx(1e-3)
    assert roofline.seconds(1, 1e15) == pytest.approx(1.0)


def test_peaks_are_those_of_the_work_done() -> None:
    clock = Machine(torch.device("cpu"), PtxLauncher(90), lambda work: 0.5)
    assert peaks(clock, size=64) == Peaks(bandwidth=2 * 8 * 64 * 64 / 0.5, flops=2 * 64**3 / 0.5)


@pytest.mark.kernels
@pytest.mark.parametrize("layout", TILE_BYTES)
def test_checks_and_timings_run(machine: Machine, layout: str) -> None:
    dense = check_dense(machine, layout, (160, 512), 7, torch.float16)
    assert dense.kernel == f"qconv_{layout}_m8_f16"
    assert 1e-5 < dense.relative_error < dense.allowed
    experts = check_experts(machine, layout, (32, 256), 9, torch.bfloat16)
    assert 1e-4 < experts.relative_error < experts.allowed
    timing = time_dense(machine, Peaks(1e30, 1e30), layout, (32, 256), 3, cache=100_000)
    assert timing.microseconds > timing.roofline_microseconds
    assert timing.bf16_microseconds is not None
    sparse = time_experts(machine, Peaks(1e30, 1e30), layout, (32, 256), 6, 2, 3)
    assert sparse.case.endswith("of 6 experts of 32 x 256")
    assert 2 <= int(sparse.case.split()[0]) <= 6


def test_the_file_says_where_and_when(tmp_path: Path) -> None:
    results = Results({**environment(torch.device("cpu"), Peaks(1.0, 2.0)), "device": "NVIDIA H100 80GB"})
    path = results.write(tmp_path)
    content = json.loads(path.read_text())
    assert path.name.startswith("nvidia-h100-80gb-20")
    assert {"device", "driver", "commit", "date", "torch", "nvrtc"} <= content["environment"].keys()
    assert content["correctness"] == content["timings"] == []
