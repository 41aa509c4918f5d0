"""Measuring on a device, and the file that the measurements end in."""

from __future__ import annotations

import json
import math
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from qconv.runtime.backends.cuda.launch import Launcher
from tests.conftest import REPOSITORY

RESULTS = REPOSITORY / "evals/results/gpu"


@dataclass(frozen=True, slots=True)
class Peaks:
    """What the device reaches with torch's own operations: the roofline.

    Attributes:
        bandwidth: Bytes a second of a large copy, read and written.
        flops: Of a large bf16 matmul, a second.
    """

    bandwidth: float
    flops: float

    def seconds(self, moved: int, flops: float) -> float:
        """The least time in which so many bytes and operations can be done."""
        return max(moved / self.bandwidth, flops / self.flops)


@dataclass(frozen=True, slots=True)
class Correctness:
    """One product against float64.

    Attributes:
        kernel: What ran.
        case: Shape, rows, experts.
        relative_error: In the Frobenius norm.
        allowed: One rounding of the output.
    """

    kernel: str
    case: str
    relative_error: float
    allowed: float


@dataclass(frozen=True, slots=True)
class Timing:
    """One product's time.

    Attributes:
        layout: The weights' layout.
        case: Shape, experts.
        rows: Tokens.
        microseconds: Of the whole product, helpers included.
        roofline_microseconds: The least that the device's peaks allow for the packed weights.
        bf16_microseconds: torch's matmul with the same weights in bf16; None where there is no counterpart.
    """

    layout: str
    case: str
    rows: int
    microseconds: float
    roofline_microseconds: float
    bf16_microseconds: float | None


@dataclass(slots=True)
class Results:
    """What one run found."""

    environment: Mapping[str, str | float]
    correctness: list[Correctness] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)

    def write(self, folder: Path) -> Path:
        """Write the file, named after device and date."""
        folder.mkdir(parents=True, exist_ok=True)
        device = re.sub(r"\W+", "-", str(self.environment["device"])).strip("-").lower()
        path = folder / f"{device}-{str(self.environment['date'])[:10]}.json"
        content = {
            "environment": dict(self.environment),
            "correctness": [asdict(each) for each in self.correctness],
            "timings": [asdict(each) for each in self.timings],
        }
        path.write_text(json.dumps(content, indent=1) + "\n")
        return path


@dataclass(frozen=True, slots=True)
class Machine:
    """A device with what runs and times kernels on it."""

    device: torch.device
    launcher: Launcher
    seconds: Callable[[Callable[[], object]], float]


WARM_UP = 0.1
"""Seconds of work before a measurement: an idle device lowers its clocks, and raises them slowly."""
LEAST = 5e-3
"""Seconds of a measurement at least: events resolve half a microsecond."""


def device_seconds(work: Callable[[], object]) -> float:
    """Time of work on the current CUDA device, captured as a graph so that the host's overhead does not count.

    The median of five measurements between two events, after as much work as brings up the clocks.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own annotation is missing
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # likewise

    def seconds(replays: int) -> float:
        start.record()
        for _ in range(replays):
            graph.replay()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3 / replays

    return measured(seconds)


def measured(seconds: Callable[[int], float]) -> float:
    """The median of five measurements, each long enough, after a warm-up.

    Args:
        seconds: Does the work so many times and returns the time of once.
    """
    once, spent = seconds(1), 0.0
    while spent < WARM_UP:
        replays = max(1, math.ceil(LEAST / once))
        once = seconds(replays)
        spent += replays * once
    replays = max(4, math.ceil(LEAST / once))
    return statistics.median(seconds(replays) for _ in range(5))


def host_seconds(work: Callable[[], object]) -> float:
    """Time of work on the CPU."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peaks(machine: Machine, size: int = 8192) -> Peaks:
    """Measure the roofline with a copy and a matmul of ``size`` squared."""
    source = torch.ones(8 * size * size, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    copying = machine.seconds(lambda: target.copy_(source))
    left = torch.randn(size, size, device=machine.device).bfloat16()
    multiplying = machine.seconds(lambda: left @ left)
    return Peaks(2 * source.nbytes / copying, 2.0 * size**3 / multiplying)


def rotated(machine: Machine, work: Sequence[Callable[[], object]]) -> float:
    """Time of one of several equal pieces of work on different memory, so that none finds its data in a cache."""

    def all_of_them() -> None:
        for each in work:
            each()

    return machine.seconds(all_of_them) / len(work)


def environment(device: torch.device, peaks: Peaks) -> dict[str, str | float]:
    """Where and when: device, driver, versions, commit, date."""
    from qconv.runtime.backends.cuda.compiler import compiler_version

    name, chosen = "cpu", "0"
    if device.type == "cuda":
        # nvidia-smi counts the machine's devices, torch those that CUDA_VISIBLE_DEVICES leaves.
        name, chosen = torch.cuda.get_device_name(device), f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    answers = {
        field: _output("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", f"--id={chosen}")
        for field in ("driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit")
    }
    return {
        "device": name,
        "driver": answers["driver_version"],
        "most_sm_clock": answers["clocks.max.sm"],
        "most_memory_clock": answers["clocks.max.memory"],
        "power_limit": answers["power.limit"],
        "torch": torch.__version__,
        "nvrtc": compiler_version(),
        "commit": _output("git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "copy_bytes_per_second": peaks.bandwidth,
        "bf16_flops": peaks.flops,
    }


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def nbytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)
