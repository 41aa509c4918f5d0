"""How this process allocates memory: from one heap that all its threads share."""

from __future__ import annotations

import ctypes

_M_ARENA_MAX = -8
"""glibc's number of the parameter (malloc.h)."""


def share_one_heap() -> bool:
    """Let all threads allocate from one heap, where the C library is glibc; whether it is.

    glibc gives threads heaps of their own, and what is freed in one cannot be used by another: a layer that one thread
    checks while others make the next one then costs memory twice. To be called before the first thread starts.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1))
    except (OSError, AttributeError):  # another C library
        return False
