"""What a candidate may use."""

from __future__ import annotations

import math
from dataclasses import dataclass

MIB = 1 << 20
MOST_FILES = 64
"""Files, folders and links in /tmp. Each takes a kilobyte of kernel memory that no limit on bytes counts."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on one candidate's process, over loading and all calls.

    Attributes:
        cpu_seconds: Processor time. It decides rather than the clock, so that a busy machine does not fail a candidate.
        wall_seconds: Time on the clock, for a candidate that sleeps.
        start_seconds: Time for the sandbox itself to start; past it the sandbox is at fault, not the candidate.
        memory: Bytes of address space.
        disk: Bytes of the private /tmp, the only place that can be written.
    """

    cpu_seconds: int = 4
    wall_seconds: float = 20.0
    start_seconds: float = 30.0
    memory: int = 512 * MIB
    disk: int = 8 * MIB

    def resources(self) -> dict[str, tuple[int, int]]:
        """Soft and hard resource limits by their names in the ``resource`` module.

        At the soft CPU limit the process gets SIGXCPU, which it may catch, and one second later SIGKILL.
        """
        return {
            "RLIMIT_CPU": (self.cpu_seconds, self.cpu_seconds + 1),
            "RLIMIT_AS": (self.memory, self.memory),
            "RLIMIT_DATA": (self.memory, self.memory),
            "RLIMIT_STACK": (8 * MIB, 8 * MIB),
            "RLIMIT_FSIZE": (self.disk, self.disk),
            "RLIMIT_NOFILE": (32, 32),
            "RLIMIT_NPROC": (1, 1),
            "RLIMIT_MEMLOCK": (0, 0),
            "RLIMIT_MSGQUEUE": (0, 0),
            "RLIMIT_SIGPENDING": (64, 64),
            "RLIMIT_CORE": (0, 0),
        }

    @property
    def tmpfs(self) -> str:
        """Options of the file system at /tmp: tmpfs(5)."""
        return f"size={self.disk},nr_inodes={MOST_FILES}"

    @property
    def longest_seconds(self) -> float:
        """After this a candidate is gone, whatever it does."""
        return math.ceil(self.start_seconds + self.wall_seconds)
