"""The emulator as a launcher of the CUDA backend."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

from qconv.runtime.backends.cuda.compiler import Source
from qconv.runtime.backends.cuda.launch import Launch
from tests.kernels.emulator import SCHEDULES, Schedule, emulator


@dataclass(slots=True)
class EmulatorLauncher:
    """Runs launches on tensors in the CPU's memory; any error that the checkers find fails the test.

    Attributes:
        multiprocessors: What the backend is to believe.
        schedule: How threads are interleaved.
        check: Whether to look for races and reads of uninitialised shared memory.
        launches: What ran, in order.
    """

    multiprocessors: int = 4
    schedule: Schedule = SCHEDULES[0]
    check: bool = True
    launches: list[Launch] = field(default_factory=list)

    def load(self, source: Source) -> None:
        """Compile a translation unit."""
        emulator(source.name.removesuffix(".cu"))

    def launch(self, launch: Launch) -> None:
        """Run one launch."""
        kernels = emulator(launch.source.name.removesuffix(".cu"))
        assert kernels.kernels[launch.kernel] == [launch.threads, launch.shared_bytes, len(launch.arguments)]

        class Arguments(ctypes.Structure):
            _fields_ = [("block", ctypes.c_char * len(launch.arguments))]

        report = kernels.launch(
            launch.kernel,
            launch.grid,
            Arguments.from_buffer_copy(launch.arguments),
            launch.inputs,
            {"output": launch.output},
            schedule=self.schedule,
            check=self.check,
        )
        assert not report.error_count, report.errors
        self.launches.append(launch)
