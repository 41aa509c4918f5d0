"""How this process allocates memory: from one heap for all threads, and large blocks from none."""

from __future__ import annotations

import ctypes

_M_ARENA_MAX = -8
_M_MMAP_THRESHOLD = -3
"""glibc's numbers of the parameters (malloc.h)."""
LARGE_BLOCK = 4 * 2**20
"""Bytes; above the intermediate values of half a million floats, which come and go by the thousand."""


def settle_allocation() -> bool:
    """Settle where memory comes from, where the C library is glibc; whether it is. Call it before the first thread.

    glibc gives threads heaps of their own, and what is freed in one cannot be used by another: a layer that one thread
    checks while others make the next one then costs memory twice. And once a large block was freed, it takes the next
    ones from a heap, where a hole between two small blocks is not given back: so peaks grew by what was in use before.
    """
    try:
        library = ctypes.CDLL(None)
        return all(library.mallopt(*pair) for pair in ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, LARGE_BLOCK)))
    except (OSError, AttributeError):  # another C library
        return False
