"""One heap for all threads of the process, and none for large blocks."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

THREADS = """
import ctypes, sys, threading
if sys.argv[1] == "settled":
    from qconv.heap import settle_allocation
    assert settle_allocation()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
addresses = [libc.malloc(1000)]
thread = threading.Thread(target=lambda: addresses.append(libc.malloc(1000)))
thread.start()
thread.join()
print(abs(addresses[1] - addresses[0]))
"""
HEAP_DISTANCE = 1 << 26
"""A heap of a thread's own begins at a multiple of 64 MiB, far from the program's."""


LARGE = """
import ctypes, sys
if sys.argv[1] == "settled":
    from qconv.heap import settle_allocation
    assert settle_allocation()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = (ctypes.c_size_t,)
libc.free.argtypes = (ctypes.c_void_p,)
libc.sbrk.restype = ctypes.c_void_p
libc.sbrk.argtypes = (ctypes.c_ssize_t,)
libc.free(libc.malloc(16 << 20))  # after which glibc takes blocks of that size from its heap
before = libc.sbrk(0)
libc.malloc(8 << 20)
print(libc.sbrk(0) - before)
"""
GLIBC = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")


def printed(script: str, mode: str) -> int:
    command = [sys.executable, "-c", script, mode]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@GLIBC
def test_threads_allocate_from_one_heap() -> None:
    assert printed(THREADS, "settled") < HEAP_DISTANCE
    assert printed(THREADS, "default") > HEAP_DISTANCE, "else this test proves nothing"


@GLIBC
def test_large_blocks_are_no_part_of_the_heap() -> None:
    assert printed(LARGE, "settled") == 0
    assert printed(LARGE, "default") >= 8 << 20, "else this test proves nothing"
