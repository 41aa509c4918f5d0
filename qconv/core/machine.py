"""What this machine has: processors that may be used, and memory that is not."""

from __future__ import annotations

import os
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")
_LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""Limit and use of a control group's memory, of version 2 and 1."""


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def available_memory(meminfo: Path = _MEMINFO, group: Path = _GROUP) -> int | None:
    """Bytes that can be had without swapping, within the limit of the process's control group; None if nothing says so.

    Args:
        meminfo: Where the kernel tells of its memory.
        group: The folder of the control group, as a container sees its own.
    """
    found = [_of_kernel(meminfo), *(_of_group(group / limit, group / used) for limit, used in _LIMITS)]
    return min((one for one in found if one is not None), default=None)


def _of_kernel(path: Path) -> int | None:
    try:
        lines = path.read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    except (OSError, ValueError, IndexError):
        return None


def _of_group(limit: Path, used: Path) -> int | None:
    try:
        return max(0, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # version 2 says "max" where there is no limit
        return None
