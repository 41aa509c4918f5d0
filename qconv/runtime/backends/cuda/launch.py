"""What is launched, and who launches it.

A launcher is told everything that the device would be told. So the backend's choices and arguments can be recorded, or
run on the emulator or the PTX interpreter, where there is no device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from qconv.runtime.backends.cuda.compiler import Source


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of one kernel.

    Attributes:
        source: The translation unit that has the kernel.
        kernel: Its name in there.
        grid: Blocks along x, y and z.
        threads: Of a block.
        shared_bytes: Dynamic shared memory of a block.
        arguments: The parameter block, as the device's compiler lays it out.
        inputs: What the kernel reads, by the names of the pointers among its arguments.
        output: What it writes.
    """

    source: Source
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    arguments: bytes
    inputs: Mapping[str, Tensor]
    output: Tensor


class Launcher(Protocol):
    """Runs launches in the order given, after the work that torch has queued on its current stream."""

    @property
    def multiprocessors(self) -> int:
        """How many multiprocessors a launch should fill."""

    def load(self, source: Source) -> None:
        """Make a translation unit's kernels ready.

        Raises:
            BackendError: it cannot be compiled or loaded.
        """

    def launch(self, launch: Launch) -> None:
        """Queue one launch.

        Raises:
            BackendError: it cannot be launched.
        """
