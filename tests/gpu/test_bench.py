"""What ``make gpu-check`` does, without a GPU: the same functions on the PTX interpreter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kernels.proof.launcher import PtxLauncher
from qconv.runtime.backends.cuda.compiler import Source
from qconv.runtime.backends.cuda.launch import Launch
from qconv.runtime.backends.cuda.weights import tensors
from qconv.runtime.kernel_interface import TILE_BYTES
from tests.gpu import bench
from tests.gpu.bench import (
    LEAST,
    WARM_UP,
    Machine,
    Peaks,
    Results,
    environment,
    host_seconds,
    measured,
    nbytes,
    peaks,
)
from tests.gpu.products import ROUNDING, check_codes, check_dense, check_experts, time_dense, time_experts
from tests.kernels.products import case


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
    for dtype in ROUNDING:
        assert check_codes(machine, layout, (32, 256), 8, dtype).relative_error == 0
    experts = check_experts(machine, layout, (32, 256), 9, torch.bfloat16)
    assert 1e-4 < experts.relative_error < experts.allowed
    timing = time_dense(machine, Peaks(1e30, 1e30), layout, (32, 256), 3, cache=2000)
    assert timing.microseconds > timing.roofline_microseconds
    assert timing.bf16_microseconds is not None
    sparse = time_experts(machine, Peaks(1e30, 1e30), layout, (32, 256), 6, 2, 3, cache=2000)
    assert sparse.case.endswith("of 6 experts of 32 x 256")
    assert 2 <= float(sparse.case.split()[0]) <= 6


@pytest.mark.parametrize("layout", TILE_BYTES)
def test_nothing_timed_is_found_in_a_cache(layout: str) -> None:
    """All that a product reads of its weight is in memory of its own in each repetition, sixteen caches together."""
    read: list[dict[str, int]] = []

    class Recorder:
        multiprocessors = 1

        def load(self, source: Source) -> None:
            """Nothing to do."""

        def launch(self, launch: Launch) -> None:
            read.append({name: tensor.data_ptr() for name, tensor in launch.inputs.items() if name != "activations"})

    def once(work: Callable[[], object]) -> float:
        work()
        return 1.0

    recording = Machine(torch.device("cpu"), Recorder(), once)
    time_dense(recording, Peaks(1.0, 1.0), layout, (32, 256), 3, cache=10_000)
    assert all(len({each[name] for each in read}) == len(read) for name in read[0])
    weight = case(layout, 32, 256, 128).packed
    assert len(read) * nbytes(list(tensors(weight).values())) >= 160_000
    read.clear()
    time_experts(recording, Peaks(1.0, 1.0), layout, (32, 256), 6, 2, 1, cache=10_000)
    assert len({each["row_ids"] for each in read}) == len(read) > 1


def test_a_measurement_warms_up_and_lasts_long_enough() -> None:
    """A device that starts at half its clocks: its slow beginning is not measured."""
    done: list[int] = []

    def seconds(replays: int) -> float:
        slow = sum(done) * 2e-5 < WARM_UP / 2
        done.append(replays)
        return 2e-5 if slow else 1e-5

    assert measured(seconds) == 1e-5
    assert all(count * 1e-5 >= LEAST for count in done[-5:])


def test_the_driver_is_asked_for_the_device_that_torch_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def answer(*command: str) -> str:
        asked.append(command)
        return {"--query-gpu=driver_version": "580.1"}.get(command[1], "1980 MHz")

    monkeypatch.setattr(bench, "_output", answer)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L40S")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12ab"))
    found = environment(torch.device("cuda", 0), Peaks(1.0, 2.0))
    assert found["device"] == "NVIDIA L40S"
    assert found["driver"] == "580.1"
    assert found["most_sm_clock"] == "1980 MHz"
    assert all("--id=GPU-12ab" in command for command in asked if command[0] == "nvidia-smi")


def test_the_file_says_where_and_when(tmp_path: Path) -> None:
    results = Results({**environment(torch.device("cpu"), Peaks(1.0, 2.0)), "device": "NVIDIA H100 80GB"})
    path = results.write(tmp_path)
    content = json.loads(path.read_text())
    assert path.name.startswith("nvidia-h100-80gb-20")
    assert {"device", "driver", "commit", "date", "torch", "nvrtc"} <= content["environment"].keys()
    assert content["correctness"] == content["timings"] == []
