"""The CPU emulator of the kernels, driven from Python."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
KERNELS = REPOSITORY / "kernels"
CACHE = REPOSITORY / "build/kernels"
FLAGS = (
    "-std=c++20",
    "-O2",
    "-march=x86-64-v3",
    "-Wall",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-fPIC",
    "-shared",
    "-fno-gnu-unique",
)
"""Without the last of them all libraries of a process would share one emulated machine."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How threads are interleaved."""

    policy: int
    seed: int = 0


SCHEDULES = (Schedule(0), Schedule(1), Schedule(2, 1), Schedule(2, 2))
"""Warps in order, in reverse, and two random interleavings with preemption."""


@dataclass(frozen=True, slots=True)
class Site:
    """What one instruction of the sources did: requests of warps, lanes, units moved and the fewest possible.

    Units are 32-byte sectors of global memory or wavefronts of shared memory. ``phases`` are the wavefronts that shared
    memory takes where no bank is asked twice.
    """

    kind: str
    file: str
    line: int
    requests: int
    lanes: int
    units: int
    ideal: int
    phases: int


@dataclass(frozen=True, slots=True)
class Report:
    """What the checkers and counters saw during a launch.

    Attributes:
        error_count: All errors; ``errors`` holds the first twenty.
        executed: Warp instructions by name.
        sites: Memory instructions.
        touched: Bytes of each buffer's 32-byte sectors that were accessed at least once.
    """

    error_count: int
    errors: tuple[str, ...]
    executed: Mapping[str, int]
    sites: tuple[Site, ...]
    touched: Mapping[str, int]

    def units(self, kind: str) -> int:
        """Units that all instructions of a kind moved."""
        return sum(site.units for site in self.sites if site.kind == kind)

    def conflicts(self) -> list[Site]:
        """Instructions of which a bank had to serve a phase twice or more."""
        return [site for site in self.sites if site.kind.endswith(".shared") and site.units > site.phases]

    def ideal(self, kind: str) -> int:
        """The fewest units that could have carried them."""
        return sum(site.ideal for site in self.sites if site.kind == kind)


class Emulator:
    """The kernels of one .cu file. One launch at a time."""

    def __init__(self, source: str) -> None:
        self._library = ctypes.CDLL(str(_build(source)))
        self._library.emulator_report.restype = ctypes.c_char_p
        self._library.emulator_kernels.restype = ctypes.c_char_p
        self._library.emulator_launch.restype = ctypes.c_longlong
        kernels: dict[str, list[int]] = json.loads(self._library.emulator_kernels())
        self.kernels = kernels
        """Entry name -> threads, bytes of shared memory, bytes of arguments."""

    def launch(
        self,
        name: str,
        grid: tuple[int, int, int],
        args: ctypes.Structure,
        inputs: Mapping[str, Tensor | None],
        outputs: Mapping[str, Tensor],
        *,
        schedule: Schedule = SCHEDULES[0],
        traffic: bool = False,
        check: bool = True,
        bug: str = "",
    ) -> Report:
        """Run a kernel.

        Args:
            name: The entry point.
            grid: Blocks in x, y, z.
            args: Its argument block, whose pointers lie in the tensors that follow.
            inputs: What it may read.
            outputs: What it may write, once an element.
            schedule: How threads are interleaved.
            traffic: Count memory traffic.
            check: Check for races and reads of uninitialised shared memory.
            bug: A planted bug of ``kernels/emulator/planted.h``.
        """
        library = self._library
        unknown = library.emulator_reset(
            schedule.policy, ctypes.c_uint64(schedule.seed), int(traffic), int(check), bug.encode()
        )
        assert not unknown, bug
        for tensors, writable in ((inputs, 0), (outputs, 1)):
            for key, tensor in tensors.items():
                if tensor is not None:
                    assert tensor.is_contiguous()
                    size = ctypes.c_uint64(tensor.numel() * tensor.element_size())
                    library.emulator_buffer(key.encode(), ctypes.c_void_p(tensor.data_ptr()), size, writable)
        launched = library.emulator_launch(name.encode(), *grid, ctypes.byref(args), ctypes.sizeof(args))
        assert launched >= 0, f"{name}: no such kernel, or it has other arguments"
        report = json.loads(library.emulator_report())
        sites = tuple(Site(*site) for site in report.pop("sites"))
        return Report(errors=tuple(report.pop("errors")), sites=sites, **report)


@functools.cache
def emulator(source: str) -> Emulator:
    """The emulator of ``kernels/cuda/SOURCE.cu``, compiled at first use."""
    return Emulator(source)


def _build(source: str) -> Path:
    """Compile, or find the library compiled from the same sources with the same flags."""
    files = sorted([*KERNELS.glob("emulator/*"), *KERNELS.glob("cuda/*.cuh"), KERNELS / f"cuda/{source}.cu"])
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for file in files:
        digest.update(file.read_bytes())
    library = CACHE / f"{source}-{digest.hexdigest()[:16]}.so"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{source}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of several test processes compiles, the others wait
        if library.exists():
            return library
        partial = library.with_suffix(f".{os.getpid()}")
        _compile(["g++", *FLAGS, f'-DQC_SOURCE="../cuda/{source}.cu"', "-o", str(partial)])
        partial.replace(library)
        for old in CACHE.glob(f"{source}-*.so"):
            if old != library:
                old.unlink(missing_ok=True)
    return library


def _compile(command: Sequence[str]) -> None:
    done = subprocess.run([*command, str(KERNELS / "emulator/host.cpp")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
