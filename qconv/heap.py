"""How this process allocates memory: from one heap for all threads, and large blocks from none."""

from __future__ import annotations

import contextlib
import ctypes
import os

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
"""glibc's numbers of the parameters (malloc.h)."""
LARGE_BLOCK = 4 * 2**20
"""Bytes; above the intermediate values of half a million floats, which come and go by the thousand."""
KEPT = 32 * 2**20
"""Free bytes at the heap's end that are kept: all that such values of several threads ever leave there."""


HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""With this environment variable, torch asks for huge pages for blocks that hold some."""


def settle_allocation() -> bool:
    """Settle where memory comes from, where the C library is glibc; whether it is.

    Call it before the first thread, and before torch is imported.

    glibc gives threads heaps of their own, and what is freed in one cannot be used by another: a layer that one thread
    checks while others make the next one then costs memory twice. And once a large block was freed, it takes the next
    ones from a heap, where a hole between two small blocks is not given back: so peaks grew by what was in use before.
    With that settled it would give the heap's end back after almost every operation, and have it zeroed anew for the
    next one. A large block comes anew from the system each time, which huge pages make several times cheaper.
    """
    os.environ.setdefault(HUGE_PAGES, "1")
    try:
        library = ctypes.CDLL(None)
        settings = ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, LARGE_BLOCK), (_M_TRIM_THRESHOLD, KEPT))
        return all(library.mallopt(*setting) for setting in settings)
    except (OSError, AttributeError):  # another C library
        return False


def return_freed_memory() -> None:
    """Give the heap's free pages back to the system, those between blocks in use too, where the C library is glibc.

    After a layer: what the next one finds is then what the first one found, and it peaks no higher.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
